"""SIGKILL at any point of a save, in a process of its own: what is left resumes, and nothing that was saved is lost."""

import multiprocessing as mp
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainer import runs
from trainer import checkpoint, shardfiles
from trainer.checkpoint import Checkpoint, Keep
from trainer.loop import Launch
from trainer.state import RunState


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.prepare_data(tmp_path_factory.mktemp("kill"))


def content(step: int) -> Checkpoint:
    return Checkpoint(RunState(step), {}, {"w": torch.full((3,), float(step))}, {"w/exp_avg": torch.ones(3)})


POINTS = {
    "a shard": (shardfiles, "save_file", 1),
    "the second shard": (shardfiles, "save_file", 2),
    "the manifest": (checkpoint, "sync_file", 1),
    "the rename": (Path, "rename", 1),
    "the rename of a replaced one": (Path, "rename", 2),
    "pruning": (checkpoint, "prune", 1),
    "deleting": (shutil, "rmtree", 2),
}


def die_while_saving(folder: Path, step: int, point: str) -> None:
    """Save in this process, which kills itself where the point says."""
    owner, name, at = POINTS[point]
    real, calls = getattr(owner, name), []

    def kill(*args: object, **kwargs: object) -> object:
        calls.append(None)
        if len(calls) == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)

    setattr(owner, name, kill)
    checkpoint.write(folder, content(step), keep=1)


def in_a_process(function: object, *args: object) -> int | None:
    """Its exit code. The server that it is forked from has imported torch already."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["parallel.check"])
    process = context.Process(target=function, args=args)  # type: ignore[arg-type]
    process.start()
    process.join(120)
    return process.exitcode


@pytest.mark.parametrize("step", [2, 1], ids=["newer", "replacing"])
@pytest.mark.parametrize("point", POINTS)
def test_killed_while_saving(tmp_path: Path, point: str, step: int) -> None:
    checkpoint.write(tmp_path, content(1), keep=1)
    code = in_a_process(die_while_saving, tmp_path, step, point)
    # A save that replaces nothing renames once, and deletes nothing of the same step.
    assert code in (-signal.SIGKILL, 0)
    path = checkpoint.newest(tmp_path, pytest.fail)
    assert path is not None
    found = checkpoint.read(path)
    assert found.state.step in (1, step) and float(found.model["w"][0]) == found.state.step
    checkpoint.write(tmp_path, content(3), keep=1)
    assert [left.name for left in tmp_path.iterdir()] == ["step-00000003"]


def test_what_was_being_replaced_is_pruned_like_any_other(tmp_path: Path) -> None:
    checkpoint.write(tmp_path, content(1), keep=1)
    (tmp_path / "step-00000001").rename(tmp_path / ".step-00000001.replaced")
    checkpoint.write(tmp_path, content(2), keep=2)
    assert list(checkpoint.steps(tmp_path)) == [1, 2] and (tmp_path / "step-00000001").is_dir()
    checkpoint.prune(tmp_path, 2, Keep(1))
    assert list(checkpoint.steps(tmp_path)) == [2]


def test_a_run_that_is_killed_again_and_again(data: Path, tmp_path: Path) -> None:
    """Each time in the middle of a save; at its end it is the run that was left alone."""
    settings: dict[str, Any] = {"steps": 12, "save_every": 1, "keep_checkpoints": 1}
    config = runs.run_config(data, tmp_path / "killed", **settings)
    folder = tmp_path / "killed" / "checkpoints"
    context = mp.get_context("forkserver")
    for published in (1, 4, 7):
        process = context.Process(target=runs.run_on_threads, args=(torch.get_num_threads(), config))
        process.start()
        deadline = time.monotonic() + 120
        while max(checkpoint.steps(folder), default=0) < published or not list(folder.glob(".step-*.partial")):
            assert process.is_alive() and time.monotonic() < deadline
        process.kill()
        process.join()
    runs.run(config)
    alone = runs.run_config(data, tmp_path / "alone", **settings)
    runs.run(alone, Launch())
    assert runs.records(config) == runs.records(alone)
    ends = [checkpoint.read(tmp_path / run / "checkpoints" / "step-00000012") for run in ("killed", "alone")]
    for name in ("model", "optimizer"):
        left, right = (getattr(end, name) for end in ends)
        assert left.keys() == right.keys() and all(left[key].equal(right[key]) for key in left)
