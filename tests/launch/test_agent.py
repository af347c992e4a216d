"""The agent of one machine: what a signal to it does, what it says of a failure, and that it leaves no process behind.

Each test is a subprocess of its own, whose processes are a small script instead of a run.
"""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

from launch.local import ROOT, environment
from trainer import process as trainer_process

AGENT = """
import sys
from launch.agent import train, work
from launch.group import Group
from trainer.signals import Stop
sys.exit({function}(Group(2, max_restarts={restarts}, shutdown_timeout={timeout}), sys.argv[1:]{more}))
"""
# Ready for signals only after a while, as a process is that imports torch; then takes its time to save.
WORKER = """
import os, pathlib, signal, sys, time
stops = []
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda number, frame: stops.append(number))
folder, slow_start, slow_save = pathlib.Path(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3])
rank = os.environ["RANK"]
(folder / f"pid-{rank}").write_text(str(os.getpid()))
time.sleep(slow_start)
signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM, signal.SIGUSR1])
(folder / f"ready-{rank}").touch()
while not stops:
    time.sleep(0.02)
time.sleep(slow_save)
(folder / f"saved-{rank}").write_text(str(stops[0]))
"""


def appears(file: Path, within: float = 60) -> None:
    end = time.monotonic() + within
    while not file.exists():
        assert time.monotonic() < end, f"{file.name} did not appear"
        time.sleep(0.05)


@contextlib.contextmanager
def started(
    folder: Path, script: str, *arguments: object, function: str = "train", timeout: float = 60, restarts: int = 0
) -> Iterator[subprocess.Popen[str]]:
    more = ", Stop()" if function == "train" else ""
    code = AGENT.format(function=function, timeout=timeout, restarts=restarts, more=more)
    worker = folder / "worker.py"
    worker.write_text(script)
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(worker), str(folder), *map(str, arguments)],
        env={**environment(os.environ), "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def alive(folder: Path) -> list[int]:
    """Processes that have not ended."""
    found = []
    for file in folder.glob("pid-*"):
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(file.read_text()), 0)
            found.append(int(file.read_text()))
    return found


def ended(process: subprocess.Popen[str], within: float = 60) -> tuple[int, str]:
    out, _ = process.communicate(timeout=within)
    return process.returncode, out


@pytest.mark.parametrize(
    ("sent", "received"),
    [(signal.SIGTERM, signal.SIGTERM), (signal.SIGUSR1, signal.SIGUSR1), (signal.SIGHUP, signal.SIGTERM)],
)
def test_a_signal_is_passed_on_and_the_end_is_a_success(
    tmp_path: Path, sent: signal.Signals, received: signal.Signals
) -> None:
    with started(tmp_path, WORKER, 0, 0.2) as process:
        for rank in (0, 1):
            appears(tmp_path / f"ready-{rank}")
        process.send_signal(sent)
        assert ended(process) == (0, "")
    assert [(tmp_path / f"saved-{rank}").read_text() for rank in (0, 1)] == [str(int(received))] * 2


def test_a_signal_at_the_start_waits_until_processes_can_take_it(tmp_path: Path) -> None:
    with started(tmp_path, WORKER, 1.5, 0) as process:
        appears(tmp_path / "pid-1")
        process.send_signal(signal.SIGTERM)
        assert ended(process) == (0, "")
    assert (tmp_path / "saved-0").exists() and (tmp_path / "saved-1").exists()


def test_ctrl_c_saves(tmp_path: Path) -> None:
    with started(tmp_path, WORKER, 0, 0.2) as process:
        appears(tmp_path / "ready-1")
        process.send_signal(signal.SIGINT)
        code, out = ended(process)
    assert code == 0 and re.fullmatch(r"weft: stopping; [^\n]+\n", out)
    assert (tmp_path / "saved-1").exists()


def test_a_second_ctrl_c_ends_at_once(tmp_path: Path) -> None:
    with started(tmp_path, WORKER, 0, 600) as process:
        appears(tmp_path / "ready-1")
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        assert ended(process)[0] == 130
    assert alive(tmp_path) == [] and not (tmp_path / "saved-1").exists()


def test_processes_that_do_not_end_are_killed(tmp_path: Path) -> None:
    with started(tmp_path, WORKER, 0, 600, timeout=0.5) as process:
        appears(tmp_path / "ready-1")
        process.send_signal(signal.SIGTERM)
        assert ended(process) == (1, "weft: the processes did not end within 0.5 s and were killed\n")
    assert alive(tmp_path) == []


@pytest.mark.slow
def test_a_save_may_take_longer_than_torchrun_grants(tmp_path: Path) -> None:
    """torchrun kills after 30 s; a save of 40 s was lost that way."""
    with started(tmp_path, WORKER, 0, 40, timeout=600) as process:
        appears(tmp_path / "ready-1")
        process.send_signal(signal.SIGTERM)
        assert ended(process, 120) == (0, "")
    assert (tmp_path / "saved-0").exists() and (tmp_path / "saved-1").exists()


def test_processes_end_with_their_agent(tmp_path: Path) -> None:
    script = WORKER.replace("time.sleep(slow_start)", "from trainer.process import end_with_agent; end_with_agent()")
    with started(tmp_path, script, 0, 0) as process:
        for rank in (0, 1):
            appears(tmp_path / f"ready-{rank}")
        process.kill()
        for rank in (0, 1):
            appears(tmp_path / f"saved-{rank}")


def test_a_process_whose_agent_is_gone_does_not_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    # Not for this process, which has no agent.
    monkeypatch.setattr("ctypes.CDLL", mock.Mock())
    monkeypatch.setenv(trainer_process.AGENT, str(os.getpid()))
    with pytest.raises(RuntimeError, match="is gone"):
        trainer_process.end_with_agent()


FAILS = """
import os, pathlib, signal, sys, time
signal.pthread_sigmask(signal.SIG_SETMASK, [])
folder, code = pathlib.Path(sys.argv[1]), int(sys.argv[2])
(folder / f"pid-{os.environ['RANK']}").write_text(str(os.getpid()))
with open(folder / "starts", "a") as file:
    file.write(os.environ["RANK"])
while (folder / "starts").stat().st_size % 2:
    time.sleep(0.02)
if os.environ["RANK"] == "1":
    os.kill(os.getpid(), -code) if code < 0 else sys.exit(code)
time.sleep(60)
"""


@pytest.mark.parametrize(
    ("code", "expected", "said"),
    [
        (2, 2, ""),
        (5, 5, "weft: rank 1 failed first, with exit code 5; see above\n"),
        (-9, 137, "weft: rank 1 was ended by SIGKILL; the system does that where memory runs out\n"),
    ],
)
def test_a_failure_ends_all_and_says_who_failed(tmp_path: Path, code: int, expected: int, said: str) -> None:
    with started(tmp_path, FAILS, code) as process:
        assert ended(process) == (expected, said)
    assert alive(tmp_path) == []
    assert (tmp_path / "starts").stat().st_size == 2


def test_restarts(tmp_path: Path) -> None:
    with started(tmp_path, FAILS, 5, restarts=1) as process:
        assert ended(process)[0] == 5
    assert (tmp_path / "starts").stat().st_size == 4


CONNECTS = """
import logging, os, pathlib, signal, sys, time
import torch, torch.distributed as dist
from parallel.mesh import MeshConfig
from trainer.process import joined
signal.pthread_sigmask(signal.SIG_SETMASK, [])
folder, rank, attempt = pathlib.Path(sys.argv[1]), os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]
(folder / f"pid-{rank}").write_text(str(os.getpid()))
if rank == "1" and attempt != "0":
    time.sleep(1)  # the other one looks for it first
with joined(MeshConfig(fsdp=2)) as mesh:
    mesh.data.sum_(torch.ones(1))
    if rank == "1" and attempt in sys.argv[2]:
        exec(sys.argv[3])
    # As torch does where a stage of a pipeline loses another.
    logging.getLogger("torch.distributed.pipelining.schedules").error("Full Schedule")
    mesh.data.sum_(torch.ones(1))
(folder / f"done-{rank}").touch()
"""
KILL = "os.kill(os.getpid(), signal.SIGKILL)"
REST = r"rank 0 on \S+ waited in start-up"
AGAIN = "the same command again starts anew\n"
KILLED = (
    r"weft: rank 1 on \S+ was ended by SIGKILL \(the system does that where memory runs out\), last seen in start-up; "
)


def test_a_run_goes_on_after_processes_were_killed(tmp_path: Path) -> None:
    with started(tmp_path, CONNECTS, "01", KILL, restarts=2) as process:
        code, out = ended(process, 200)
    assert code == 0 and re.fullmatch(f"({KILLED}{REST}; {AGAIN}){{2}}", out)
    assert (tmp_path / "done-0").exists() and (tmp_path / "done-1").exists()


def test_the_others_say_who_was_killed_and_where(tmp_path: Path) -> None:
    with started(tmp_path, CONNECTS, "0", KILL) as process:
        code, out = ended(process, 100)
    assert code == 137 and re.fullmatch(f"{KILLED}{REST}; {AGAIN}", out)
    assert alive(tmp_path) == []


def test_only_the_cause_is_shown_in_full(tmp_path: Path) -> None:
    with started(tmp_path, CONNECTS, "0", "raise RuntimeError('out of thread')") as process:
        code, out = ended(process, 100)
    assert code == 1 and out.count("Traceback") == 1 and "RuntimeError: out of thread" in out
    assert re.search(rf"weft: rank 1 on \S+ failed in start-up; {REST}; see the error above; {AGAIN}", out)
    assert out.endswith("weft: rank 1 failed first, with exit code 1; see above\n")


@pytest.mark.parametrize(
    ("stalls", "said"),
    [
        ("os.kill(os.getpid(), signal.SIGSTOP)", r"does not answer, last seen in start-up; {rest}; {again}"),
        pytest.param(
            "time.sleep(1000)",
            r"stays in start-up; {rest}; raise train\.timeout if that only takes long; {again}",
            marks=pytest.mark.slow,
        ),
    ],
    ids=["stopped", "elsewhere"],
)
def test_a_rank_that_stalls_ends_the_run(tmp_path: Path, stalls: str, said: str) -> None:
    script = CONNECTS.replace("MeshConfig(fsdp=2)", "MeshConfig(fsdp=2), timeout=3")
    with started(tmp_path, script, "0", stalls) as process:
        for rank in (0, 1):
            appears(tmp_path / f"pid-{rank}")
        code, out = ended(process, 100)
    rest = rf"{REST} for 3 s \(train\.timeout\)"
    assert code == 4 and re.fullmatch(r"weft: rank 1 on \S+ " + said.format(rest=rest, again=AGAIN), out)
    assert alive(tmp_path) == []


def test_asked_to_stop_before_the_start(tmp_path: Path) -> None:
    code = "import sys; from launch import agent; from launch.group import Group; from trainer.signals import Stop\n"
    code += "stop = Stop(); stop.requested = True; sys.exit(agent.train(Group(2), ['-c', '1 / 0'], stop))"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(os.environ), cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr == "weft: asked to stop before the processes had started; the same command again begins\n"


def test_processes_without_a_run_end_with_the_signal(tmp_path: Path) -> None:
    script = WORKER.replace("signal.signal(", "(lambda *_: None)(")
    with started(tmp_path, script, 0, 0, function="work") as process:
        for rank in (0, 1):
            appears(tmp_path / f"ready-{rank}")
        process.send_signal(signal.SIGTERM)
        assert ended(process) == (143, "")
    assert alive(tmp_path) == []
