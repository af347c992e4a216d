"""Saving beside the training: safe against what changes meanwhile, one at a time, and a failure does not end a run."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from parallel.engine import Engine
from parallel.mesh import Mesh, MeshConfig
from parallel.testing import Pool
from tests.trainer import runs
from trainer import checkpoint, shardfiles
from trainer.loop import Launch
from trainer.process import build_engine
from trainer.saver import Saver
from trainer.state import RunState
from trainer.whereabouts import Whereabouts


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.prepare_data(tmp_path_factory.mktemp("saver"))


def saver_of(config: runs.RunConfig, said: list[str]) -> tuple[Engine, Saver]:
    engine = build_engine(config, Mesh.single())
    return engine, Saver(config, engine, config.optim.build(engine), None, said.append, Whereabouts())


class Gate:
    """Holds `save_file` until it is opened, and counts how many are in it at once."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.open, self.inside, self.most = threading.Event(), 0, 0
        self._save_file = shardfiles.save_file
        patch.setattr(shardfiles, "save_file", self)

    def __call__(self, *args: Any) -> None:
        self.inside += 1
        self.most = max(self.most, self.inside)
        assert self.open.wait(60)
        self._save_file(*args)
        self.inside -= 1


@torch.no_grad()
def test_a_save_holds_the_weights_of_its_moment(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, said = Gate(monkeypatch), []
    engine, saver = saver_of(runs.run_config(data, tmp_path), said)
    before = engine.full_state()
    with saver:
        saver.save(RunState(3, 12, 288))
        for held in engine.held():
            held.parameter.zero_()
        saver.poll()
        assert not said and not checkpoint.steps(tmp_path / "checkpoints")
        gate.open.set()
    assert said == [f"saved {tmp_path}/checkpoints/step-00000003"]
    found = checkpoint.read(tmp_path / "checkpoints" / "step-00000003")
    assert found.state == RunState(3, 12, 288) and found.mesh == "one process"
    assert found.model.keys() == before.keys()
    for name, value in before.items():
        torch.testing.assert_close(found.model[name], value, rtol=0, atol=0)


def test_one_save_at_a_time(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, said = Gate(monkeypatch), []
    _, saver = saver_of(runs.run_config(data, tmp_path, keep_checkpoints=3), said)
    with saver:
        saver.save(RunState(1))
        threading.Timer(0.2, gate.open.set).start()
        saver.save(RunState(2))
        assert list(checkpoint.steps(tmp_path / "checkpoints")) == [1] and len(said) == 1
    assert gate.most == 1 and list(checkpoint.steps(tmp_path / "checkpoints")) == [1, 2]


def test_ranks_share_the_writing(data: Path, tmp_path: Path, pool: Pool) -> None:
    """Replicas hold the same; each of two writes half of it, up to the largest tensor."""
    config = runs.run_config(data, tmp_path, MeshConfig(dp=2))
    pool.run(runs.run_to, 2, config, 1)
    (path,) = checkpoint.steps(tmp_path / "checkpoints").values()
    sizes = [(path / f"model-0000{rank}-000.safetensors").stat().st_size for rank in range(2)]
    largest = max(value.nbytes for value in checkpoint.read(path).model.values())
    assert abs(sizes[0] - sizes[1]) <= largest + 4096


@pytest.mark.parametrize("mesh", [MeshConfig(), MeshConfig(dp=2)], ids=str)
def test_a_failed_save_is_a_warning(data: Path, tmp_path: Path, pool: Pool, mesh: MeshConfig) -> None:
    """On the last rank alone; what it left is cleaned up, the older checkpoint stays and the next save is tried."""
    config = runs.run_config(data, tmp_path, mesh, keep_checkpoints=5, save_every=1)
    printed = pool.run(run_with_failures, mesh.world_size, config, (2, 3))[0]
    where = " on rank 1" if mesh.dp > 1 else ""
    assert "warning: the checkpoint of step 2 was not saved (no space left" in printed
    assert f"left{where}); the newest is still that of step 1" in printed
    assert list(checkpoint.steps(tmp_path / "checkpoints")) == [1, 4, 5, 6]
    assert not list((tmp_path / "checkpoints").glob(".*"))


def test_a_last_save_that_fails_is_an_error_on_every_rank(data: Path, tmp_path: Path, pool: Pool) -> None:
    config = runs.run_config(data, tmp_path, MeshConfig(dp=2), save_every=2)
    found = pool.run(run_with_failures, 2, config, (6, 7))
    assert (
        found
        == ["step 6, the last, could not be saved (no space left on rank 1); the run can be resumed from step 4"] * 2
    )
    assert list(checkpoint.steps(tmp_path / "checkpoints")) == [2, 4]


@pytest.mark.parametrize("due", [True, False])
def test_a_last_save_that_fails_is_told_once(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, due: bool
) -> None:
    """By the error alone, whether or not it was begun by the step; a failure before it keeps its warning."""
    save_file = shardfiles.save_file

    def save(tensors: dict[str, torch.Tensor], file: Path) -> None:
        if "step-00000001" not in str(file):
            raise OSError("no space left")
        save_file(tensors, file)

    monkeypatch.setattr(shardfiles, "save_file", save)
    said: list[str] = []
    _, saver = saver_of(runs.run_config(data, tmp_path), said)
    with (
        pytest.raises(OSError, match=r"^step 3, the last, could not be saved \(no space left\); .* from step 1$"),
        saver,
    ):
        for step in (1, 2, *([3] if due else [])):
            saver.save(RunState(step))
        saver.finish(RunState(3))
    assert said == [
        f"saved {tmp_path}/checkpoints/step-00000001",
        "warning: the checkpoint of step 2 was not saved (no space left); the newest is still that of step 1",
    ]


def run_with_failures(config: runs.RunConfig, failing: tuple[int, ...]) -> str:
    """What the run printed, or its error. failing: the steps that the last rank cannot save."""
    save_file = shardfiles.save_file
    mesh = Mesh(config.mesh)

    def save(tensors: dict[str, torch.Tensor], file: Path) -> None:
        step = int(file.parent.name.split("-")[1].split(".")[0])
        if mesh.rank == mesh.config.world_size - 1 and step in failing:
            raise OSError("no space left")
        save_file(tensors, file)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shardfiles, "save_file", save)
        try:
            return runs.run(config, None, mesh)[1]
        except OSError as error:
            return str(error)


def test_what_is_kept(data: Path, tmp_path: Path) -> None:
    config = runs.run_config(data, tmp_path, steps=7, save_every=1, keep_checkpoints=2, keep_every=3)
    runs.run(config)
    assert list(checkpoint.steps(tmp_path / "checkpoints")) == [3, 6, 7]


def test_what_a_resumed_run_found_damaged_does_not_count(data: Path, tmp_path: Path) -> None:
    """Resumed from 2 for 3 is damaged: 2 whole ones stay at each save, and 3 until it is saved again, or far behind."""
    folder = tmp_path / "checkpoints"
    config = runs.run_config(data, tmp_path, steps=6, save_every=1, keep_checkpoints=2)
    runs.run(config, Launch(stop_after=3))
    assert list(checkpoint.steps(folder)) == [2, 3]
    flip(folder / "step-00000003" / "model-00000-000.safetensors")
    (folder / "step-00000003").rename(folder / "step-00000005")
    kept: dict[int, list[int]] = {}
    prune = checkpoint.prune

    def watched(folder: Path, step: int, *arguments: Any) -> None:
        prune(folder, step, *arguments)
        kept[step] = list(checkpoint.steps(folder))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "prune", watched)
        runs.run(config)
    assert kept == {3: [2, 3, 5], 4: [3, 4, 5], 5: [4, 5], 6: [5, 6]}
    assert all(checkpoint.damage(path) is None for path in checkpoint.steps(folder).values())


def test_a_damaged_one_between_whole_ones_takes_no_ones_place(data: Path, tmp_path: Path) -> None:
    """Resumed from 2 with 3 damaged, and saving every second step: 4 must not push out 2, and 6 does."""
    folder = tmp_path / "checkpoints"
    runs.run(runs.run_config(data, tmp_path, save_every=1, keep_checkpoints=2), Launch(stop_after=3))
    flip(folder / "step-00000003" / "model-00000-000.safetensors")
    config = runs.run_config(data, tmp_path, steps=6, save_every=2, keep_checkpoints=2)
    runs.run(config, Launch(stop_after=4))
    assert list(checkpoint.steps(folder)) == [2, 3, 4]
    runs.run(config)
    assert list(checkpoint.steps(folder)) == [4, 6]


def flip(file: Path) -> None:
    """Change the last bit."""
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
