"""torchrun's elastic agent for the processes of one machine, and what becomes of a signal to it.

torchrun answers SIGTERM by killing whatever has not ended 30 seconds later (torch before 2.13 has no other choice) and
fails with a traceback even if every process ended well. A run that saves needs more: `SavingAgent` passes the signal on
and goes on watching, so that processes which save and end are a success, as at any other end.
"""

import contextlib
import logging
import math
import os
import signal
import sys
import time
from collections.abc import Sequence
from types import FrameType, MappingProxyType
from typing import Any

import torch.distributed.elastic.rendezvous.registry as rendezvous
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.rendezvous import RendezvousError, RendezvousParameters

from launch.command import UnfinishedError
from launch.group import Group
from launch.local import environment
from trainer.process import AGENT
from trainer.signals import Stop

# What the processes of a run take as "save and end". Ctrl-C and the end of a terminal session come to the agent alone.
ASKS = MappingProxyType(
    {
        signal.SIGTERM: signal.SIGTERM,
        signal.SIGUSR1: signal.SIGUSR1,
        signal.SIGINT: signal.SIGTERM,
        signal.SIGHUP: signal.SIGTERM,
    }
)
# torchrun's names for the signals that end everything at once.
ENDS, SAVING_ENDS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT", "SIGQUIT"


def spec(group: Group, arguments: Sequence[str]) -> WorkerSpec:
    """Processes that are each this Python with these arguments."""
    # Processes of one machine need no host name, which laptops often cannot resolve.
    local = "localhost" if group.nodes == 1 else None
    parameters = RendezvousParameters("c10d", group.endpoint, group.id, group.nodes, group.nodes, local_addr=local)
    return WorkerSpec(
        role="weft",
        local_world_size=group.nproc,
        rdzv_handler=rendezvous.get_rendezvous_handler(parameters),
        entrypoint=sys.executable,
        args=("-u", *arguments),
        max_restarts=group.max_restarts,
        local_addr=local,
    )


class SavingAgent(LocalElasticAgent):
    """For processes that answer SIGTERM and SIGUSR1 by saving and ending with exit code 0.

    They start with both blocked: one that comes before a process can handle it waits until it does.
    """

    def __init__(self, spec: WorkerSpec, shutdown_timeout: float) -> None:
        super().__init__(spec, DefaultLogsSpecs())
        self._timeout, self._deadline = shutdown_timeout, math.inf
        self._pids: list[int] = []
        self._asked: signal.Signals | None = None

    def ask(self, number: int, _: FrameType | None = None) -> None:
        """Handle a signal. A second Ctrl-C ends everything at once, and so does any where nothing has started."""
        if not self._pids or (number == self._asked == signal.SIGINT):
            raise SignalException(f"signal {number}", signal.SIGKILL)
        if number == signal.SIGINT:
            print("weft: stopping; the run is being saved. Ctrl-C again ends it at once, unsaved", file=sys.stderr)
        self._asked = signal.Signals(number)
        self._deadline = min(self._deadline, time.monotonic() + self._timeout)
        self._pass_on()

    def _pass_on(self) -> None:
        if self._asked is None:
            return
        for pid in self._pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, ASKS[self._asked])

    # torch's own two, which have no types.
    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:  # type: ignore[override]
        before = signal.pthread_sigmask(signal.SIG_BLOCK, ASKS)
        try:
            pids = super()._start_workers(worker_group)  # type: ignore[call-arg]
            self._pids = list(pids.values())
            self._pass_on()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return pids

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:  # type: ignore[override]
        if time.monotonic() > self._deadline:
            print(f"weft: the processes did not end within {self._timeout:g} s and were killed", file=sys.stderr)
            raise SignalException("too late", signal.SIGKILL)
        return super()._monitor_workers(worker_group)  # type: ignore[call-arg]

    def listen(self) -> None:
        """Take the signals that ask for an end."""
        os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = SAVING_ENDS
        for number in ASKS:
            # Under nohup, the end of the terminal session is none of ours.
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self.ask)

    def verdict(self) -> int:
        """The exit code after everything was ended at once; nothing is lost where nothing had started."""
        return 130 if self._asked == signal.SIGINT else int(bool(self._pids))


def train(group: Group, arguments: Sequence[str], stop: Stop) -> int:
    """Run Python as the processes of `group`, which save when they are told to stop; returns the exit code.

    stop: took the signals until now.
    """
    prepare(group)
    agent = SavingAgent(spec(group, arguments), group.shutdown_timeout)
    try:
        agent.listen()
        return 0 if stop.requested else outcome(agent)
    except SignalException:
        return agent.verdict()


def work(group: Group, arguments: Sequence[str]) -> int:
    """Run Python as the processes of `group`, which have nothing to save; returns the exit code."""
    prepare(group)
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = ENDS
    try:
        return outcome(LocalElasticAgent(spec(group, arguments), DefaultLogsSpecs()))
    except SignalException as error:
        return 128 + error.sigval


def prepare(group: Group) -> None:
    """What the processes inherit, and no reports of torch's own: `outcome` says what happened."""
    os.environ.update(environment(os.environ, group.nproc) | {AGENT: str(os.getpid())})
    log = logging.getLogger("torch.distributed.elastic")
    log.addHandler(logging.NullHandler())
    log.propagate = False


def outcome(agent: LocalElasticAgent) -> int:
    """Run the agent to its end; the exit code is that of the process that failed first.

    Raises SignalException, and UnfinishedError where the machines did not find one another.
    """
    try:
        result: Any = agent.run()
    except RendezvousError as error:
        raise UnfinishedError(
            f"the machines did not find one another ({error}); start the same command on each, "
            "with the --rdzv-endpoint of the first and one --rdzv-id"
        ) from error
    if not result.is_failed():
        return 0
    rank, failure = min(result.failures.items(), key=lambda item: item[1].timestamp)
    if failure.exitcode < 0:
        name = signal.Signals(-failure.exitcode).name
        hint = "; the system does that where memory runs out" if name == "SIGKILL" else ""
        print(f"weft: rank {rank} was ended by {name}{hint}", file=sys.stderr)
        return 128 - failure.exitcode
    # A refusal, 2, was said by the process in full.
    if failure.exitcode != 2:
        print(f"weft: rank {rank} failed first, with exit code {failure.exitcode}; see above", file=sys.stderr)
    return failure.exitcode
