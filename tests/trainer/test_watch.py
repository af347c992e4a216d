"""Who is said to hold up a run, and that its processes agree on it and end in time."""

import threading
import time
from collections.abc import Callable

import pytest
from torch.distributed import HashStore  # pyright: ignore[reportPrivateImportUsage]

from trainer import watch
from trainer.gathering import DIED
from trainer.verdict import Findings, named
from trainer.watch import PEER_LOST, Watch, lost_peer
from trainer.whereabouts import SAVING, TRAINING, Place, Report, Whereabouts

AGAIN = "the same command again resumes after step 10"


def at(text: str, count: int, waits: bool = True, host: str = "a", **more: bool) -> Report:
    return Report(host, 1, {TRAINING: Place(text, count, 0.0, waits)}, **more)


GRADIENTS, UPDATE = at("step 12, gradients", 20), at("step 12, update", 21)
LOADING = at("step 12, loading data", 19, waits=False, host="b")


@pytest.mark.parametrize(
    ("findings", "sentence"),
    [
        (
            Findings({0: GRADIENTS, 1: at("step 12, gradients", 20, host="b")}, silent=[1]),
            f"rank 1 on b is gone, last seen in step 12, gradients; rank 0 on a waited in step 12, gradients; {AGAIN}",
        ),
        (
            Findings({0: GRADIENTS, 1: GRADIENTS}, silent=[1, 2], timeout=60),
            "rank 1 on a does not answer, last seen in step 12, gradients, and rank 2 does not answer, last seen in "
            f"start-up; rank 0 on a waited in step 12, gradients for 60 s (train.timeout); {AGAIN}",
        ),
        (
            Findings({**dict.fromkeys(range(5), GRADIENTS), 5: UPDATE}, silent=[1, 5], ended={1: "SIGKILL"}),
            "rank 1 on a was ended by SIGKILL (the system does that where memory runs out), last seen in step 12, "
            "gradients; ranks 0, 2-4 on a waited in step 12, gradients, and rank 5 on a waited in step 12, update; "
            f"{AGAIN}",
        ),
        (
            Findings({0: GRADIENTS, 1: at("step 12, gradients", 20, failed=True)}),
            "rank 1 on a failed in step 12, gradients; rank 0 on a waited in step 12, gradients; see the error above; "
            f"{AGAIN}",
        ),
        # One that does not wait while others do holds them up, wherever they are.
        (
            Findings({0: GRADIENTS, 1: LOADING, 2: GRADIENTS}, timeout=60),
            "rank 1 on b stays in step 12, loading data; ranks 0, 2 on a waited in step 12, gradients for 60 s "
            f"(train.timeout); raise train.timeout if that only takes long; {AGAIN}",
        ),
        # One that has lost others waited, although it has left the collective.
        (
            Findings({0: at("step 12, gradients", 20, waits=False, lost=True), 1: LOADING}, timeout=60),
            "rank 1 on b stays in step 12, loading data; rank 0 on a waited in step 12, gradients for 60 s "
            f"(train.timeout); raise train.timeout if that only takes long; {AGAIN}",
        ),
        # Where all wait, it is those that are the furthest behind.
        (
            Findings({0: UPDATE, 1: GRADIENTS, 2: UPDATE}, timeout=60),
            "rank 1 on a stays in step 12, gradients; ranks 0, 2 on a waited in step 12, update for 60 s "
            f"(train.timeout); raise train.timeout if that only takes long; {AGAIN}",
        ),
        (
            Findings({0: GRADIENTS, 1: GRADIENTS}, timeout=60),
            "all wait for one another for 60 s (train.timeout), ranks 0, 1 on a in step 12, gradients; " + AGAIN,
        ),
    ],
    ids=["gone", "no answer", "killed", "failed", "elsewhere", "lost", "behind", "nobody"],
)
def test_the_sentence(findings: Findings, sentence: str) -> None:
    assert findings.sentence(AGAIN) == sentence


def test_a_save_that_waits_is_judged_by_where_saves_are() -> None:
    def saving(waits: bool) -> Report:
        places = {TRAINING: Place("step 9, saving", 30), SAVING: Place("step 8, writing its checkpoint", 2, 0.0, waits)}
        return Report("a", 1, places)

    said = Findings({0: saving(True), 1: saving(False)}, activity=SAVING, timeout=5).sentence(AGAIN)
    assert said.startswith("rank 1 on a stays in step 8, writing its checkpoint; rank 0 on a waited in step 8, writing")


def test_named() -> None:
    assert [named(ranks) for ranks in ([4], [4, 5], [0, 1, 2, 5], [0, 2])] == [
        "rank 4",
        "ranks 4, 5",
        "ranks 0-2, 5",
        "ranks 0, 2",
    ]


def test_places() -> None:
    where = Whereabouts()
    where.at("step 1, gradients")
    place = where.places()[TRAINING]
    assert (place.text, place.count, place.waits) == ("step 1, gradients", 1, False) and 0 <= place.since < 60
    report = Report("a", 3, where.places())
    assert Report.of_json(report.to_json()) == report
    where.saved(10)
    assert where.way_out == AGAIN


def test_a_rank_in_a_collective_is_seen_to_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    where = Whereabouts()
    monkeypatch.setattr("trainer.whereabouts.WAITS_IN", (__file__,))
    assert [where.places()[TRAINING].waits for _ in range(1)] == [False], "the innermost frame is Whereabouts' own"
    done = threading.Event()

    def wait() -> None:
        where.at("step 1, gradients")
        while not done.is_set():
            pass

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    try:
        end = time.monotonic() + 20
        while not where.places()[TRAINING].waits:
            assert time.monotonic() < end
    finally:
        done.set()
        thread.join()


@pytest.mark.parametrize(
    ("text", "lost"),
    [
        ("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:3011", True),
        ("[gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 5000ms for recv operation to complete", True),
        ("wait timeout after 8000ms, keys: /default_pg/0//cpu//0/1", True),
        ("mat1 and mat2 shapes cannot be multiplied", False),
    ],
)
def test_lost_peer(text: str, lost: bool) -> None:
    error = ValueError("wrapped")
    error.__cause__ = RuntimeError(text)
    assert lost_peer(error) is lost
    assert not lost_peer(ValueError(text)) and not lost_peer(None)


class Ranks:
    """Watches of several ranks in this process, which do not end it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, count: int, timeout: float = 1000.0) -> None:
        for name, seconds in (("BEAT", 0.02), ("SILENCE", 0.4), ("GRACE", 0.1)):
            monkeypatch.setattr(watch, name, seconds)
        self.store, self.left = HashStore(), dict[int, int]()
        self.where = [Whereabouts() for _ in range(count)]
        self.watches = [
            Watch(self.where[rank], self.store, rank, count, timeout, leave=self._leave(rank)) for rank in range(count)
        ]
        for each in self.watches:
            each.__enter__()

    def _leave(self, rank: int) -> Callable[[int], None]:
        def leave(code: int) -> None:
            self.left[rank] = code
            self.watches[rank]._stop.set()

        return leave

    def all_left(self, *but: int) -> None:
        end = time.monotonic() + 20
        while self.left != dict.fromkeys(set(range(len(self.watches))) - {*but}, PEER_LOST):
            assert time.monotonic() < end, self.left
            time.sleep(0.01)

    def close(self) -> None:
        for each in self.watches:
            each._stop.set()


def test_all_end_with_one_sentence(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    ranks = Ranks(monkeypatch, 3)
    time.sleep(0.2)
    assert not ranks.left
    ranks.watches[0]._stop.set()  # as if it were stopped, or killed
    with pytest.raises(SystemExit):
        ranks.watches[2].end(RuntimeError("Connection closed by peer"))
    ranks.all_left(0)
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("weft: rank 0 on ") and "is gone, last seen in start-up; ranks 1, 2 on" in line


def test_a_launcher_that_saw_a_death_ends_the_others_at_once(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    ranks = Ranks(monkeypatch, 2)
    ranks.watches[1]._stop.set()
    ranks.store.set(DIED, "1 SIGBUS\n")
    ranks.all_left(1)
    assert "was ended by SIGBUS, last seen in start-up; rank 0" in capfd.readouterr().err


def test_one_that_stays_behind_is_found_without_a_collective_that_ends(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """On a GPU, a process waits where the collective's end is asked for."""
    ranks = Ranks(monkeypatch, 2, timeout=0.5)
    try:
        for where in ranks.where:
            where.at("step 1, validation")
        time.sleep(1.5)
        assert not ranks.left, "both are at one place, which may take its time"
        ranks.where[1].at("step 2, gradients")
        time.sleep(0.3)
        assert not ranks.left, "the other may follow in a moment"
        ranks.all_left()
        assert "rank 0 on " in (said := capfd.readouterr().err)
        assert "stays in step 1, validation; rank 1 on" in said and "waited in step 2, gradients for 0.5 s" in said
    finally:
        ranks.close()


def test_the_machine_of_the_store_is_lost(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    ranks = Ranks(monkeypatch, 2)
    time.sleep(0.3)
    ranks.watches[0]._stop.set()
    silent = threading.Event()
    monkeypatch.setattr(HashStore, "set", lambda *_: silent.wait(5))
    with pytest.raises(SystemExit):
        ranks.watches[1].end(RuntimeError("Timed out waiting 1000ms for recv operation to complete"))
    ranks.all_left(0)
    silent.set()
    assert "rank 0 on " in (said := capfd.readouterr().err) and "does not answer, last seen in start-up" in said


def test_a_failure_is_left_for_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Ranks(monkeypatch, 2)
    try:
        ranks.watches[1].__exit__(KeyError, KeyError("x"), None)
        assert Report.of_json(ranks.store.get("rank/1")).failed
    finally:
        ranks.close()
