"""Checkpoints: whole or not there, verified when read, and never the last good one deleted."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from trainer import shardfiles
from trainer.checkpoint import Checkpoint, Keep, damage, newest, prune, read, steps, write
from trainer.state import RunState


def content(step: int) -> Checkpoint:
    tensors = {"layers.0.w": torch.full((3, 2), float(step)), "b": torch.tensor([step])}
    return Checkpoint(RunState(step, 4 * step, 96 * step), {"train": {"steps": 9}}, tensors, {"steps": torch.ones(1)})


def test_what_is_written_is_read(tmp_path: Path) -> None:
    found = read(write(tmp_path, content(3), keep=1))
    assert found.state == content(3).state and found.config == content(3).config
    assert torch.equal(found.model["layers.0.w"], content(3).model["layers.0.w"])


MODEL, OPTIMIZER = "model-00000-000.safetensors", "optimizer-00000-000.safetensors"


@pytest.mark.parametrize("name", [MODEL, OPTIMIZER, "index.json", "state.json", "manifest.json"])
@pytest.mark.parametrize("how", ["missing", "truncated", "changed"])
def test_damage_is_seen_and_an_older_one_taken(tmp_path: Path, name: str, how: str) -> None:
    older, newer = write(tmp_path, content(1), keep=2), write(tmp_path, content(2), keep=2)
    data = bytearray((newer / name).read_bytes())
    if how == "missing":
        (newer / name).unlink()
    elif how == "truncated":
        (newer / name).write_bytes(data[:-3])
    else:
        data[len(data) // 2] ^= 1
        (newer / name).write_bytes(data)
    assert damage(newer) is not None and damage(older) is None
    warnings: list[str] = []
    assert newest(tmp_path, warnings.append) == older
    assert len(warnings) == 1 and "falling back" in warnings[0]


@pytest.mark.parametrize(
    "manifest",
    [
        [],
        3,
        None,
        {},
        {"format": 2, "files": []},
        {"format": 2, "files": None},
        {"format": 2, "files": {}},
        {"format": 2, "files": {"index.json": 3, "state.json": 3}},
        {"format": 2, "files": {"index.json": {}, "state.json": {}}},
        {"format": 2, "files": {"index.json": {"bytes": [], "sha256": {}}, "state.json": {}}},
        {"format": 2, "files": {"index.json": {"bytes": 1}, "state.json": {"bytes": 1}, "../x": {"bytes": 1}}},
    ],
    ids=json.dumps,
)
def test_a_manifest_of_another_shape_is_damage(tmp_path: Path, manifest: object) -> None:
    path = write(tmp_path, content(1), keep=1)
    (path / "manifest.json").write_text(json.dumps(manifest))
    assert damage(path) is not None


@pytest.mark.parametrize("name", ["index.json", "state.json"])
def test_a_manifest_that_lacks_a_file_is_damage(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, content(1), keep=1)
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["files"][name]
    (path / "manifest.json").write_text(json.dumps(manifest))
    assert damage(path) == f"its manifest.json does not describe {name}"


def test_a_manifest_nested_too_deep_is_damage(tmp_path: Path) -> None:
    path = write(tmp_path, content(1), keep=1)
    (path / "manifest.json").write_text("[" * 100_000)
    assert damage(path) is not None


def test_only_older_ones_are_pruned(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        write(tmp_path, content(step), keep=2)
    assert list(steps(tmp_path)) == [3, 4]


def test_damaged_newer_ones_do_not_push_out_good_ones(tmp_path: Path) -> None:
    """After a fallback from 8 to 4, saving 6 keeps 4 and 6, and saving 8 replaces the damaged 8."""
    for step in (4, 8):
        write(tmp_path, content(step), keep=2)
    (tmp_path / "step-00000008" / "state.json").unlink()
    write(tmp_path, content(6), keep=2)
    assert list(steps(tmp_path)) == [4, 6, 8]
    write(tmp_path, content(8), keep=2)
    assert list(steps(tmp_path)) == [6, 8] and damage(tmp_path / "step-00000008") is None


@pytest.mark.parametrize(
    ("newest", "left"), [(1, [9]), (2, [7, 8, 9]), (3, [6, 7, 8, 9]), (4, [4, 5, 6, 7, 8, 9]), (5, [4, 5, 6, 7, 8, 9])]
)
def test_damaged_ones_do_not_count(tmp_path: Path, newest: int, left: list[int]) -> None:
    """Of 4 to 9, with 5 and 8 damaged: they go once `newest` whole ones are newer, and never instead of one."""
    for step in range(4, 10):
        write(tmp_path, content(step), keep=6)
    prune(tmp_path, 9, Keep(newest), damaged={5, 8})
    assert list(steps(tmp_path)) == left


@pytest.mark.parametrize("call", ["save_file", "fsync", "rename"])
def test_a_crash_while_saving_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    """Whatever stops a save before its end, the older checkpoint is there, and the next save works."""
    write(tmp_path, content(1), keep=1)

    def crash(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        owner = {"save_file": shardfiles, "fsync": os, "rename": Path}[call]
        patch.setattr(owner, call, crash)
        with pytest.raises(OSError, match="no space"):
            write(tmp_path, content(2), keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert newest(tmp_path, pytest.fail) == tmp_path / "step-00000001"
    write(tmp_path, content(2), keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]


def test_none_is_not_damaged(tmp_path: Path) -> None:
    assert newest(tmp_path, pytest.fail) is None
    assert newest(tmp_path / "nowhere", pytest.fail) is None
    write(tmp_path, content(1), keep=1)
    shutil.rmtree(tmp_path / "step-00000001")
    (tmp_path / "step-00000001").mkdir()
    with pytest.raises(ValueError, match="all 1 checkpoints"):
        newest(tmp_path, lambda _: None)
