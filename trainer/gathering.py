"""The store by which the processes of a run find one another, for what they have to say beside their collectives."""

import os
from datetime import timedelta

from torch.distributed import PrefixStore, Store, TCPStore  # pyright: ignore[reportPrivateImportUsage]

# The key under which launchers leave who died: a line per rank, with the signal.
DIED = "died"
# The key of what is said at the end of a run that lost processes: JSON of the rank that says it, and the sentence.
VERDICT = "verdict"


def report_of(rank: int) -> str:
    """The key of a rank's last report."""
    return f"rank/{rank}"


def connect(address: str, port: int, timeout: float, attempt: int | None = None) -> Store:
    """A connection of its own: one of torch's is closed to others while it waits for a key.

    attempt: how often the processes were started before, by default as this process was told. Raises RuntimeError where
    the store does not answer within `timeout` seconds.
    """
    return of_attempt(TCPStore(address, port, is_master=False, timeout=timedelta(seconds=timeout)), attempt)


def of_attempt(store: Store, attempt: int | None = None) -> Store:
    """What is said in one start of a run's processes: torchrun's store outlives them."""
    number = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) if attempt is None else attempt
    return PrefixStore(f"weft/{number}", store)
