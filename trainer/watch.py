"""A run whose processes lose one another ends within a time, with one sentence on who is missing and where.

Every process has a thread that publishes where the process is in the run's store and another that judges. They go on
while the process computes or waits, and stop with it where it is killed or stopped. Once one process has lost another,
or waited for it longer than `train.timeout`, the reports of all say who is late, one process says so, and all end.
"""

import contextlib
import dataclasses
import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import NoReturn

from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage]

from trainer.gathering import DIED, VERDICT, report_of
from trainer.verdict import Findings
from trainer.whereabouts import TRAINING, Report, Whereabouts

# The exit code of a process that could not go on because another one of the run did not.
PEER_LOST = 4
# What gloo and NCCL say of a process that is gone, and of one that does not come.
GONE = re.compile("Connection reset by peer|Connection closed by peer|Broken pipe|remote process exited")
LATE = re.compile("[Tt]imed? ?out")
# Seconds between two reports of a process, without one until it counts as gone, and between verdict and end.
BEAT, SILENCE, GRACE = 0.5, 4.0, 1.0
# Reports that a process may read per beat: the store serves all processes of a run.
READ_PER_BEAT = 64


def lost_peer(error: BaseException | None) -> bool:
    """Whether torch raised this, or what led to it, because another process was gone or did not come in time."""
    return any(GONE.search(text) or LATE.search(text) for text in causes(error))


class SaveLostError(RuntimeError):
    """A save lost another process. Its cause is what torch raised."""


def causes(error: BaseException | None) -> list[str]:
    """The texts of the RuntimeErrors in a chain of errors."""
    found = []
    while error is not None:
        if isinstance(error, RuntimeError):
            found.append(str(error))
        error = error.__cause__ or error.__context__
    return found


@dataclasses.dataclass(frozen=True)
class Alarm:
    """A reason to end. activity: what cannot go on. since: by this process's clock. waited: seconds that it waited for
    others, None where a connection broke."""

    activity: str
    since: float
    waited: float | None = None


class Watch:
    """Watches over this process and, with those of the other processes, over the run.

    store: a connection that nothing else uses. timeout: train.timeout. speaks: where the store is gone, each machine
    says so once. leave: ends the process.
    """

    def __init__(
        self,
        where: Whereabouts,
        store: Store,
        rank: int,
        world: int,
        timeout: float,
        speaks: bool = True,
        leave: Callable[[int], object] = os._exit,
    ) -> None:
        self._where, self._store, self._timeout, self._leave = where, store, timeout, leave
        self._rank, self._world, self._speaks = rank, world, speaks
        self._host, self._beat, self._lost, self._failed = socket.gethostname(), 0, False, False
        self._stop, self._hurry, self._posted = threading.Event(), threading.Event(), threading.Event()
        # The last report of each rank, and when it was first seen here.
        self._reports: dict[int, tuple[Report, float]] = {}
        self._died: dict[int, str] = {}
        self._answered = time.monotonic()
        self._alarm: Alarm | None = None
        self._text: str | None = None
        self._verdict: tuple[int, str] | None = None
        self._threads = [threading.Thread(target=each, daemon=True) for each in (self._post, self._judge)]

    def __enter__(self) -> "Watch":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None:
            # The others need not guess who was the first.
            self._failed = True
            self._posted.clear()
            self._hurry.set()
            self._posted.wait(2 * BEAT)
        self._stop.set()
        self._hurry.set()
        for thread in self._threads:
            thread.join(2 * BEAT)

    def end(self, error: BaseException, activity: str = TRAINING) -> NoReturn:
        """This process has lost another: one of those that are left says so, and this one ends."""
        broken = any(GONE.search(text) for text in causes(error))
        self._lost = True
        self._alarm = Alarm(activity, time.monotonic(), None if broken else self._timeout)
        self._hurry.set()
        time.sleep(5 * SILENCE)
        self._leave(PEER_LOST)
        raise SystemExit(PEER_LOST)

    # A thread publishes and reads. The store may keep it waiting for ever.

    def _post(self) -> None:
        turn = 0
        while not self._stop.is_set():
            with contextlib.suppress(RuntimeError):
                self._exchange(turn)
                self._answered = time.monotonic()
                self._posted.set()
            turn += 1
            self._hurry.wait(BEAT)
            self._hurry.clear()

    def _exchange(self, turn: int) -> None:
        self._beat += 1
        own = Report(self._host, self._beat, self._where.places(), self._lost, self._failed)
        self._store.set(report_of(self._rank), own.to_json())
        if self._text is not None:
            self._store.compare_set(VERDICT, "", json.dumps([min(self._live(), default=self._rank), self._text]))
        if self._store.check([VERDICT]):
            speaker, text = json.loads(self._store.get(VERDICT))
            self._verdict = speaker, text
        if self._store.check([DIED]):
            lines = self._store.get(DIED).decode().splitlines()
            self._died = {int(rank): name for rank, name in map(str.split, lines)}
            self._alarm = self._alarm or Alarm(TRAINING, time.monotonic())
        if self._alarm or (self._speaks and turn % (1 + self._world // READ_PER_BEAT) == 0):
            self._read()

    def _read(self) -> None:
        now, found = time.monotonic(), dict(self._reports)
        keys = {rank: report_of(rank) for rank in range(self._world)}
        if not self._store.check(list(keys.values())):
            keys = {rank: key for rank, key in keys.items() if self._store.check([key])}
        for rank, text in zip(keys, self._store.multi_get(list(keys.values())), strict=True):
            report = Report.of_json(text)
            if rank not in found or found[rank][0].beat != report.beat:
                found[rank] = report, now
        self._reports = found

    def _silent(self, seconds: float) -> list[int]:
        """Ranks that have never reported, or not for that long when others have."""
        reports = self._reports
        now = max((seen for _, seen in reports.values()), default=0.0)
        return [rank for rank in range(self._world) if rank not in reports or now - reports[rank][1] > seconds]

    def _live(self) -> list[int]:
        gone = {*self._silent(SILENCE - BEAT), *self._died}
        return [rank for rank, (report, _) in self._reports.items() if not (rank in gone or report.failed)]

    # Another judges. It waits for nobody.

    def _judge(self) -> None:
        while not self._stop.wait(BEAT):
            if self._verdict is not None:
                self._part(*self._verdict)
            elif self._alarm is not None:
                self._weigh(self._alarm)
            elif self._stuck():
                self._alarm = Alarm(TRAINING, time.monotonic(), self._timeout)

    def _stuck(self) -> bool:
        """Whether this process and another have been at different places for longer than collectives may take.

        On a GPU a process waits without knowing for what, and one that nobody waits for has no collective that ends.
        """
        own = self._where.places()[TRAINING]
        if own.since < self._timeout + SILENCE:
            return False
        if time.monotonic() - self._answered > SILENCE or (self._speaks and self._silent(self._timeout)):
            return True
        others = [report.places[TRAINING] for report, _ in self._reports.values() if not report.failed]
        return any(other.count != own.count and other.since > self._timeout for other in others)

    def _weigh(self, alarm: Alarm) -> None:
        """Give a verdict as soon as there is enough to tell."""
        elapsed, quiet = time.monotonic() - alarm.since, time.monotonic() - self._answered
        if elapsed > SILENCE and quiet > SILENCE:
            self._part(self._rank if self._speaks else -1, self._without_store(alarm))
        reports = {rank: report for rank, (report, _) in self._reports.items()}
        told = self._died or any(report.failed for report in reports.values())
        if self._text is None and quiet < SILENCE and (told or elapsed > SILENCE + BEAT):
            findings = Findings(reports, self._silent(SILENCE - BEAT), dict(self._died), alarm.activity, alarm.waited)
            self._text = findings.sentence(self._where.way_out)
            self._hurry.set()

    def _without_store(self, alarm: Alarm) -> str:
        """It was on the machine of rank 0, which is gone, or cannot be reached."""
        reports = {rank: report for rank, (report, _) in self._reports.items()}
        host = reports[0].host if 0 in reports else self._host
        gone = [rank for rank, report in reports.items() if report.host == host != self._host] or [0]
        return Findings(reports, gone, {}, alarm.activity, alarm.waited).sentence(self._where.way_out)

    def _part(self, speaker: int, text: str) -> None:
        if speaker == self._rank:
            print(f"weft: {text}", file=sys.stderr, flush=True)
        time.sleep(GRACE)
        self._leave(PEER_LOST)
