"""A signal in any phase ends in a saved state and exit code 0, and what is resumed is what was never interrupted."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from configs.structure import to_plain
from parallel.engine import Engine
from parallel.mesh import Mesh, MeshConfig
from parallel.testing import Pool
from tests.compilers import needs_compiler
from tests.slow import in_turn
from tests.trainer import runs
from trainer import checkpoint, loop, shardfiles
from trainer.engines.native import NativeConfig
from trainer.loop import train
from trainer.signals import Stop

PHASES: dict[str, tuple[object, str]] = {
    "start-up": (NativeConfig, "build"),
    "resuming": (loop, "resume"),
    "step": (Engine, "step_gradients"),
    "validation": (loop, "evaluate"),
    "saving": (shardfiles, "save_file"),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.prepare_data(tmp_path_factory.mktemp("signals"))


def interrupt(patch: pytest.MonkeyPatch, phase: str, number: signal.Signals, *, times: int = 1) -> None:
    """Have this process send itself the signal in the second call of what the phase is, or the first if it has one."""
    owner, name = PHASES[phase]
    real: Callable[..., object] = getattr(owner, name)
    calls: list[None] = []

    def wrapped(*args: object, **kwargs: object) -> object:
        calls.append(None)
        if len(calls) == (1 if phase in ("start-up", "resuming") else 2):
            for _ in range(times):
                os.kill(os.getpid(), number)
        return real(*args, **kwargs)

    patch.setattr(owner, name, wrapped)


def run_interrupted(config: runs.RunConfig, phase: str, number: signal.Signals, rank: int = 0) -> int:
    """The step at which a run ends that is interrupted on one rank."""
    mesh = Mesh(config.mesh)
    with pytest.MonkeyPatch.context() as patch, Stop() as stop:
        if mesh.rank == rank:
            interrupt(patch, phase, number, times=2)
        return train(config, mesh, stop=stop).step


ENDS = {"start-up": 0, "resuming": 0, "step": 2, "validation": 5, "saving": None}


@pytest.mark.parametrize(("phase", "number"), in_turn(ENDS, (signal.SIGTERM, signal.SIGUSR1)))
def test_a_signal_in_any_phase(data: Path, tmp_path: Path, phase: str, number: signal.Signals) -> None:
    whole = runs.run_config(data, tmp_path / "whole", eval_every=2, save_every=2)
    parts = runs.run_config(data, tmp_path / "parts", eval_every=2, save_every=2)
    ended = run_interrupted(parts, phase, number)
    # The thread that saves is interrupted while the steps go on.
    end = ENDS[phase]
    assert ended == end if end is not None else 2 <= ended < 6
    assert list(checkpoint.steps(tmp_path / "parts" / "checkpoints"))[-1] == ended
    assert runs.run_through(parts) == runs.run_through(whole)
    for name in ("model", "optimizer"):
        left, right = (
            getattr(checkpoint.read(tmp_path / run / "checkpoints" / "step-00000006"), name)
            for run in ("whole", "parts")
        )
        assert left.keys() == right.keys() and all(left[key].equal(right[key]) for key in left)


@pytest.mark.parametrize("mesh", [MeshConfig(dp=2), MeshConfig(pp=2)], ids=str)
def test_ranks_decide_together(data: Path, tmp_path: Path, pool: Pool, mesh: MeshConfig) -> None:
    """A signal that only one rank gets ends all of them after the same step."""
    config = runs.run_config(data, tmp_path, mesh, micro_batch=1)
    assert pool.run(run_interrupted, 2, config, "step", signal.SIGTERM, 1, timeout=60) == [2, 2]
    assert list(checkpoint.steps(tmp_path / "checkpoints")) == [2]


def test_handlers_are_given_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Stop() as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.requested
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_signal_is_answered_at_once(data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """In the step that it comes in, once, and not before there is a step to wait for."""
    said: list[str] = []
    step_gradients = Engine.step_gradients

    def slow(*args: Any) -> object:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
        said.append(capfd.readouterr().err)
        return step_gradients(*args)

    with pytest.MonkeyPatch.context() as patch, Stop() as stop:
        patch.setattr(Engine, "step_gradients", slow)
        assert train(runs.run_config(data, tmp_path / "run"), Mesh.single(), stop=stop).step == 1
    assert said == ["asked to stop: the run saves and ends after the step that it is in\n"]
    assert run_interrupted(runs.run_config(data, tmp_path / "other"), "start-up", signal.SIGTERM) == 0
    assert "asked to stop" not in capfd.readouterr().err


def handles_signals(pid: int) -> bool:
    """Whether the process has a handler of its own for SIGTERM."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return bool(int(status["SigCgt"], 16) >> (signal.SIGTERM - 1) & 1)


def runs_compiler(pid: int) -> bool:
    """Whether a C++ compiler runs below the process."""
    for listed in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in listed.read_text().split():
            with contextlib.suppress(FileNotFoundError):
                if "cc1plus" in Path(f"/proc/{child}/comm").read_text() or runs_compiler(int(child)):
                    return True
    return False


def waited_for(wait: str, pid: int, run: Path) -> bool:
    metrics = run / "metrics.jsonl"
    match wait:
        case "import":
            return handles_signals(pid)
        case "compiling":
            return runs_compiler(pid)
        case _:
            return metrics.is_file() and metrics.stat().st_size > 0


@pytest.mark.parametrize(
    "wait", ["import", pytest.param("compiling", marks=[needs_compiler, pytest.mark.slow]), "training"]
)
def test_a_process_that_gets_sigterm_exits_with_0(data: Path, tmp_path: Path, wait: str) -> None:
    """While it imports torch, while it compiles its layers, and while it trains."""
    compiling = wait == "compiling"
    config = runs.run_config(data, tmp_path / "run", steps=100_000, log_every=1, save_every=0, compile=compiling)
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(to_plain(config)))
    command = [sys.executable, "-m", "launch.cli", "train", str(file)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as process:
        try:
            deadline = time.monotonic() + 120
            while not waited_for(wait, process.pid, tmp_path / "run"):
                assert time.monotonic() < deadline
                time.sleep(0.01)
            process.send_signal(signal.SIGTERM)
            out, error = process.communicate(timeout=120)
        finally:
            process.kill()
    assert process.returncode == 0, error.decode()
    assert b"Traceback" not in error
    (step,) = checkpoint.steps(tmp_path / "run" / "checkpoints")
    assert {"import": step == 0, "compiling": step == 1, "training": step > 0}[wait]
    assert f"ended after step {step}" in out.decode()
