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
from torch.distributed import PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.rendezvous import RendezvousError, RendezvousParameters, RendezvousStoreInfo

from launch.command import UnfinishedError
from launch.deaths import Attempt
from launch.group import Group
from launch.local import environment
from trainer.process import AGENT
from trainer.signals import Stop
from trainer.watch import PEER_LOST

# What the processes of a run take as "save and end". Ctrl-C and the end of a terminal session come to the agent alone.
ASKS = MappingProxyType(
    {
        signal.SIGTERM: signal.SIGTERM,
        signal.SIGUSR1: signal.SIGUSR1,
        signal.SIGINT: signal.SIGTERM,
        signal.SIGHUP: signal.SIGTERM,
    }
)
# Seconds that processes get to say that another one failed, and to end.
PART = 6.0
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


class Agent(LocalElasticAgent):
    """Gives every attempt a store of its own, in which its processes find one another.

    torch (2.13) keeps one store for all attempts, and its processes write their addresses under the same keys in each:
    after a restart, a process that reads before its peer writes connects to the one that died.
    """

    def __init__(self, spec: WorkerSpec) -> None:
        super().__init__(spec, DefaultLogsSpecs())
        self._server: TCPStore | None = None
        self.attempt: Attempt | None = None

    def _rendezvous(self, worker_group: WorkerGroup) -> None:  # type: ignore[override]
        super()._rendezvous(worker_group)  # type: ignore[call-arg]
        # What the machines share of this attempt alone; torch's own keys of the same names are beside it.
        shared, rank, address = worker_group.store, worker_group.group_rank, worker_group.spec.local_addr
        assert shared is not None and rank is not None
        if rank == 0:
            self._server = TCPStore(address or "localhost", 0, is_master=True)
        port = self._server.port if rank == 0 and self._server is not None else None
        found = RendezvousStoreInfo.build(rank, PrefixStore("weft", shared), address, port)
        # torch declares both as None.
        worker_group.master_addr = found.master_addr  # type: ignore[assignment]
        worker_group.master_port = found.master_port  # type: ignore[assignment]
        before = worker_group.spec.max_restarts - self._remaining_restarts
        self.attempt = Attempt(found.master_addr, found.master_port, before)

    # torch's own have no types.
    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:  # type: ignore[override]
        # torch's, once a process has failed, ends the others at once, before they can say what they know.
        failed = self._failed(worker_group)
        if failed and self.attempt is not None:
            self.attempt.tell({rank: name for rank, name in failed.items() if name})
            self._let_part()
        return super()._monitor_workers(worker_group)  # type: ignore[call-arg]

    def _failed(self, worker_group: WorkerGroup) -> dict[int, str]:
        """The processes that have failed, each with the signal that ended it, if one did; torch waits for them."""
        found = {}
        for local_rank, pid in self._pcontext.pids().items() if self._pcontext else ():
            with contextlib.suppress(ChildProcessError):
                end = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
                if end is not None and end.si_status:
                    name = "" if end.si_code == os.CLD_EXITED else signal.Signals(end.si_status).name
                    found[worker_group.workers[local_rank].global_rank] = name
        return found

    def _let_part(self) -> None:
        """Give the processes that are left a moment to end by themselves, where they watch over one another."""
        assert self._pcontext is not None and self.attempt is not None
        pids, deadline = set(self._pcontext.pids().values()), time.monotonic() + PART
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                # One that is stopped cannot end.
                os.kill(pid, signal.SIGCONT)
        watched = self.attempt.watched()
        while watched and time.monotonic() < deadline and any(map(lives, pids)):
            time.sleep(0.1)


def lives(pid: int) -> bool:
    """Whether a child has not ended yet."""
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
    except ChildProcessError:
        return False


class SavingAgent(Agent):
    """For processes that answer SIGTERM and SIGUSR1 by saving and ending with exit code 0.

    They start with both blocked: one that comes before a process can handle it waits until it does.
    """

    def __init__(self, spec: WorkerSpec, shutdown_timeout: float) -> None:
        super().__init__(spec)
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
        if not self._pids:
            return not_begun()
        return 130 if self._asked == signal.SIGINT else 1


def not_begun() -> int:
    """The exit code of a run that was asked to stop before it was one."""
    print("weft: asked to stop before the processes had started; the same command again begins", file=sys.stderr)
    return 0


def train(group: Group, arguments: Sequence[str], stop: Stop) -> int:
    """Run Python as the processes of `group`, which save when they are told to stop; returns the exit code.

    stop: took the signals until now.
    """
    prepare(group)
    agent = SavingAgent(spec(group, arguments), group.shutdown_timeout)
    try:
        agent.listen()
        return not_begun() if stop.requested else outcome(agent)
    except SignalException:
        return agent.verdict()


def work(group: Group, arguments: Sequence[str]) -> int:
    """Run Python as the processes of `group`, which have nothing to save; returns the exit code."""
    prepare(group)
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = ENDS
    try:
        return outcome(Agent(spec(group, arguments)))
    except SignalException as error:
        return 128 + error.sigval


def prepare(group: Group) -> None:
    """What the processes inherit, and no reports of torch's own: `outcome` says what happened."""
    os.environ.update(environment(os.environ, group.nproc) | {AGENT: str(os.getpid())})
    log = logging.getLogger("torch.distributed.elastic")
    log.addHandler(logging.NullHandler())
    log.propagate = False


def outcome(agent: Agent) -> int:
    """Run the agent to its end; the exit code is that of the process that failed first by itself.

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
    # Times are whole seconds; whoever only lost a peer is never the cause of what another died of.
    rank, failure = min(result.failures.items(), key=lambda item: (item[1].exitcode == PEER_LOST, item[1].timestamp))
    if failure.exitcode < 0:
        name = signal.Signals(-failure.exitcode).name
        hint = "; the system does that where memory runs out" if name == "SIGKILL" else ""
        attempt = agent.attempt
        if attempt is None or not attempt.said():
            seen = attempt.last_seen(rank) if attempt else ""
            print(f"weft: rank {rank} was ended by {name}{seen}{hint}", file=sys.stderr)
        return 128 - failure.exitcode
    # The process itself has said what these are.
    if failure.exitcode not in (2, PEER_LOST):
        print(f"weft: rank {rank} failed first, with exit code {failure.exitcode}; see above", file=sys.stderr)
    return failure.exitcode
