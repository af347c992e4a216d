"""How the processes of a run meet, and who says so where one does not come."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from trainer.process import meet, said
from trainer.watch import PEER_LOST


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> TCPStore:
    """A launcher's."""
    made = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(made.port))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    return made


def outcomes(ranks: list[int], world: int, seconds: float) -> list[BaseException | None]:
    with ThreadPoolExecutor(len(ranks)) as threads:
        return [going.exception() for going in [threads.submit(meet, rank, world, seconds) for rank in ranks]]


@pytest.mark.parametrize("missing", [0, 2])
def test_the_first_of_those_that_came_names_the_missing_one(store: TCPStore, missing: int) -> None:
    assert not said(store)
    speaker, *others = outcomes([rank for rank in range(4) if rank != missing], 4, 1.0)
    assert str(speaker).startswith(f"rank {missing} did not come within 1 s; start all 4 processes at the same time")
    assert [other.code for other in others if isinstance(other, SystemExit)] == [PEER_LOST] * 2
    assert said(store), "whoever comes late adds nothing"


def test_all_come(store: TCPStore) -> None:
    assert outcomes([0, 1, 2], 3, 30.0) == [None] * 3
    assert not said(store)
