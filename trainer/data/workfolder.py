"""The folder in which data are prepared: whose it is, what is left of an interrupted call, and what is complete."""

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainer.data.manifest import manifest_of
from trainer.data.prepare_config import PrepareConfig
from trainer.data.sources import find_files
from trainer.data.workfiles import read_json, write_json
from trainer.lock import LOCK, sole_use

PLAN = "plan.json"


def finished(out: Path, config: PrepareConfig, arguments: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest of a complete `out`; None if there is nothing yet. Raises ValueError for anything else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    manifest = manifest_of(out)
    if manifest is None or "arguments" not in manifest:
        raise ValueError(f"{out} exists and holds something else; give another folder")
    refuse_other(out, manifest["arguments"], arguments)
    try:
        now = {file.path: file.bytes for file in find_files(config.sources, config.suffixes_of_folders)}
    except ValueError:
        return manifest  # the text need not be kept
    then = {file["path"]: file["bytes"] for file in manifest["sources"]}
    for path in sorted(now.keys() | then.keys()):
        if now.get(path) != then.get(path):
            raise ValueError(
                f"{out} was prepared before {path} was changed, added or removed; give another folder, or remove it"
            )
    return manifest


def refuse_other(folder: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    for name in new:
        if old.get(name) != new[name]:
            raise ValueError(
                f"{folder} was prepared with {name} {json.dumps(old.get(name))}, and {json.dumps(new[name])} is asked "
                "for now; give another folder, or remove that one"
            )


def begin(work: Path, plan: dict[str, Any]) -> None:
    """Take up a work folder of the same plan, or of another one that has not come to tokens. Raises ValueError."""
    old = read_json(work / PLAN)
    if old == plan:
        return
    if has_shards(work):
        refuse_other(work, (old or {}).get("arguments", {}), plan["arguments"])
        raise ValueError(
            f"the files were changed since {work} was begun; remove that folder, and all is prepared from the beginning"
        )
    for path in work.iterdir():
        if path.name != LOCK:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for name in ("scan", "shards"):
        (work / name).mkdir()
    write_json(work / PLAN, plan)


def has_shards(work: Path) -> bool:
    return any((work / "shards").glob("*.json"))


def discard(work: Path) -> None:
    """What is left of a call that was stopped after the last step."""
    if (work / PLAN).is_file():
        with locked(work):
            shutil.rmtree(work)


@contextlib.contextmanager
def locked(work: Path) -> Iterator[None]:
    """Nobody else writes to `work`. Raises ValueError when somebody does, or when the folder is not ours."""
    if work.is_dir() and any(work.iterdir()) and not (work / LOCK).is_file():
        raise ValueError(f"{work}, which is where the work is done, holds something else; move it away")
    work.mkdir(parents=True, exist_ok=True)
    with sole_use(work, "wait for it, or stop it"):
        yield
