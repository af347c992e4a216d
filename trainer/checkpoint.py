"""Checkpoints: folders that are complete from the moment they have their name.

`step-00000010/` holds model.safetensors and optimizer.safetensors (whole tensors by parameter name, so that any mesh
can load them), state.json (where the run stands, and its config) and manifest.json (size and SHA-256 of the others). It
is written under another name, synced to the disk, renamed, and only then are older ones deleted.
"""

import dataclasses
import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from trainer.durable import sha256_of_file, sync_file, sync_folder
from trainer.state import RunState

MANIFEST = "manifest.json"
FILES = ("model.safetensors", "optimizer.safetensors", "state.json")
NAME = re.compile(r"step-(\d{8,})")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's content. Tensors are whole and on the CPU."""

    state: RunState
    config: dict[str, Any]
    model: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]


def steps(folder: Path) -> dict[int, Path]:
    """The published checkpoints by step, in ascending order, whether or not they are whole."""
    paths = folder.iterdir() if folder.is_dir() else ()
    found = {int(match[1]): path for path in paths if (match := NAME.fullmatch(path.name))}
    return dict(sorted(found.items()))


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None: every file must have the size and hash that the manifest says.

    The manifest may be damaged itself, and is taken for any JSON.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return f"its {MANIFEST} is missing or unreadable"
    listed = manifest.get("files") if isinstance(manifest, dict) else None
    for name in FILES:
        expected = listed.get(name) if isinstance(listed, dict) else None
        if not isinstance(expected, dict):
            return f"its {MANIFEST} does not describe {name}"
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != expected.get("bytes") or sha256_of_file(file) != expected.get("sha256"):
            return f"{name} is not what was written"
    return None


def newest(folder: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest whole checkpoint, after a warning for every damaged one that is newer; None if there is none at all.

    Raises ValueError if there are checkpoints and all are damaged.
    """
    found = steps(folder)
    for path in reversed(found.values()):
        reason = damage(path)
        if reason is None:
            return path
        warn(f"checkpoint {path} is damaged ({reason}); falling back to an older one")
    if found:
        raise ValueError(
            f"all {len(found)} checkpoints in {folder} are damaged; restore one, or start anew with --fresh"
        )
    return None


def read(path: Path) -> Checkpoint:
    """Read a checkpoint that `damage` has passed."""
    data = json.loads((path / "state.json").read_text(encoding="utf-8"))
    tensors = [load_file(path / f"{name}.safetensors") for name in ("model", "optimizer")]
    return Checkpoint(RunState(**data["state"]), data["config"], *tensors)


def write(folder: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Publish a checkpoint, then delete all older ones but the newest `keep` - 1; returns its path.

    One of the same step gives way.
    """
    folder.mkdir(parents=True, exist_ok=True)
    name = f"step-{checkpoint.state.step:08}"
    staging = folder / f".{name}.partial"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    save_file(dict(checkpoint.model), staging / "model.safetensors")
    save_file(dict(checkpoint.optimizer), staging / "optimizer.safetensors")
    data = {"state": dataclasses.asdict(checkpoint.state), "config": checkpoint.config}
    (staging / "state.json").write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    files = {
        file.name: {"bytes": file.stat().st_size, "sha256": sha256_of_file(file)} for file in sorted(staging.iterdir())
    }
    (staging / MANIFEST).write_text(json.dumps({"format": 1, "files": files}, indent=2) + "\n", encoding="utf-8")
    for file in staging.iterdir():
        sync_file(file)
    sync_folder(staging)
    path = folder / name
    if path.exists():
        replaced = folder / f".{name}.replaced"
        shutil.rmtree(replaced, ignore_errors=True)
        path.rename(replaced)
    staging.rename(path)
    sync_folder(folder)
    prune(folder, checkpoint.state.step, keep)
    return path


def prune(folder: Path, step: int, keep: int) -> None:
    """Delete what is older than the newest `keep` up to `step`, which must be whole, and what was left half done."""
    upto = [path for number, path in steps(folder).items() if number <= step]
    for path in upto[:-keep]:
        shutil.rmtree(path)
    for path in folder.glob(".step-*.*"):
        shutil.rmtree(path)
