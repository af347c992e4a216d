"""What a launcher tells the processes that are left about one that was killed, and what they have said of it."""

import contextlib
import dataclasses
from collections.abc import Mapping

from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage]

from trainer.gathering import DIED, VERDICT, connect, report_of
from trainer.whereabouts import TRAINING, Report

ANSWER = 5.0  # seconds that the store gets to answer, where it is still there


@dataclasses.dataclass(frozen=True)
class Attempt:
    """The store of one start of a run's processes: where it is, and how many starts were before."""

    address: str
    port: int
    number: int

    def _store(self) -> Store:
        return connect(self.address, self.port, ANSWER, self.number)

    def tell(self, killed: Mapping[int, str]) -> None:
        """Leave the signal that ended each rank, for the watches of the others."""
        with contextlib.suppress(RuntimeError):
            lines = "".join(f"{rank} {signal}\n" for rank, signal in killed.items())
            # torch declares it not.
            self._store().append(DIED, lines)  # type: ignore[attr-defined]

    def watched(self) -> bool:
        """Whether the processes report where they are."""
        with contextlib.suppress(RuntimeError):
            return self._store().check([report_of(0)])
        return False

    def said(self) -> bool:
        """Whether one of the processes has said how the run ended."""
        with contextlib.suppress(RuntimeError):
            return self._store().check([VERDICT])
        return False

    def last_seen(self, rank: int) -> str:
        """Where a rank was, as it said last; empty if it has not."""
        with contextlib.suppress(RuntimeError):
            store = self._store()
            if store.check([report_of(rank)]):
                return f", last seen in {Report.of_json(store.get(report_of(rank))).places[TRAINING].text}"
        return ""
