"""Checkpoints: folders that are complete from the moment they have their name.

`step-00000010/` holds the tensors (`trainer.shardfiles`), state.json (where the run stands, its config and mesh) and
manifest.json (size and SHA-256 of all others). It is written under another name, synced to the disk, renamed, and only
then are older ones deleted. This file knows folders and needs no process group; `trainer.saver` writes on all ranks.
"""

import concurrent.futures
import dataclasses
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_saver import save as plan_and_write

from configs.errors import sentence
from parallel.pieces import Piece, entire
from trainer.durable import sha256_of_file, sync_file, sync_folder
from trainer.shardfiles import INDEX, PiecePlanner, ShardReader, ShardWriter, Tensors
from trainer.state import RunState

FOLDER = "checkpoints"
MANIFEST = "manifest.json"
STATE = "state.json"
FORMAT = 2
NAME = re.compile(r"step-(\d{8,})")
REPLACED = re.compile(r"\.step-(\d{8,})\.replaced")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's content. Tensors are whole and on the CPU; of one that was read, each is read when asked for.

    mesh: on which it was written.
    """

    state: RunState
    config: dict[str, Any]
    model: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    mesh: str = "one process"


@dataclasses.dataclass(frozen=True)
class Keep:
    """Which checkpoints stay: the newest `newest`, and those at multiples of `every` steps (0: none)."""

    newest: int
    every: int = 0


def steps(folder: Path) -> dict[int, Path]:
    """The published checkpoints by step, in ascending order, whether or not they are whole.

    One that was being replaced when the machine stopped is found under the name that it had at that moment.
    """
    paths = list(folder.iterdir()) if folder.is_dir() else []
    found = {int(match[1]): path for path in paths if (match := REPLACED.fullmatch(path.name))}
    found |= {int(match[1]): path for path in paths if (match := NAME.fullmatch(path.name))}
    return dict(sorted(found.items()))


def manifest_of(path: Path) -> dict[str, dict[str, Any]]:
    """The files of a checkpoint, each with its "bytes" and "sha256".

    Raises ValueError saying what is wrong. The manifest may be damaged itself, and is taken for any JSON.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        raise ValueError(f"its {MANIFEST} is missing or unreadable") from None
    listed = manifest.get("files") if isinstance(manifest, dict) else None
    if isinstance(manifest, dict) and manifest.get("format") != FORMAT:
        raise ValueError(f"its format is {manifest.get('format')!r}, and this Weft reads {FORMAT}")
    for name in (INDEX, STATE):
        if not isinstance(listed, dict) or name not in listed:
            raise ValueError(f"its {MANIFEST} does not describe {name}")
    assert isinstance(listed, dict)
    for name, expected in listed.items():
        if not isinstance(expected, dict) or not isinstance(expected.get("bytes"), int) or "/" in name:
            raise ValueError(f"its {MANIFEST} does not describe {name}")
    return listed


def damage(
    path: Path,
    *,
    hashes: bool = True,
    part: str = "",
    share: tuple[int, int] = (0, 1),
    tell: Callable[[int], object] = lambda _: None,
) -> str | None:
    """What is wrong with a checkpoint, or None: every file must have the size and hash that the manifest says.

    hashes: without, sizes alone. part: hash only "model" or "optimizer", and what both need. share: hash only the files
    of this rank, (rank, ranks). tell: called with the bytes of every file that is done.
    """
    try:
        files = manifest_of(path)
    except ValueError as error:
        return str(error)
    for name, expected in files.items():
        if not (path / name).is_file():
            return f"{name} is missing"
        if (path / name).stat().st_size != expected["bytes"]:
            return f"{name} has {(path / name).stat().st_size} bytes and was written with {expected['bytes']}"
    wanted = [name for name in files if hashes and (not name.endswith(".safetensors") or name.startswith(part))]
    # The largest first, so that neither ranks nor threads end with one left to wait for.
    wanted = sorted(wanted, key=lambda name: (-files[name]["bytes"], name))[share[0] :: share[1]]

    def differs(name: str) -> bool:
        try:
            return sha256_of_file(path / name) != files[name].get("sha256")
        except OSError:
            return True
        finally:
            tell(files[name]["bytes"])

    with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        wrong = [name for name, bad in zip(wanted, threads.map(differs, wanted), strict=True) if bad]
    return f"{wrong[0]} is not what was written" if wrong else None


def newest(folder: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest whole checkpoint, after a warning for every damaged one that is newer; None if there is none at all.

    Raises ValueError if there are checkpoints and all are damaged.
    """
    return newest_of(steps(folder), folder, warn, damage)


def newest_of(
    found: Mapping[int, Path], folder: Path, warn: Callable[[str], None], judge: Callable[[Path], str | None]
) -> Path | None:
    """`newest` among `found` (see `steps`). judge: what is wrong with one of them, or None."""
    for path in reversed(list(found.values())):
        reason = judge(path)
        if reason is None:
            return path
        warn(f"checkpoint {path} is damaged ({reason}); falling back to an older one")
    if found:
        raise ValueError(
            f"all {len(found)} checkpoints in {folder} are damaged; restore one, or train anew with weft train --fresh"
        )
    return None


def choose(path: Path, warn: Callable[[str], None], hashes: bool = True) -> Path:
    """The checkpoint that `path` is, or else the newest whole one of the run whose folder it is, for its weights.

    hashes: without, sizes alone are verified. Raises ValueError if it is damaged, or there is none.
    """
    if NAME.fullmatch(path.name):
        if reason := damage(path, part="model", hashes=hashes):
            raise ValueError(
                f"checkpoint {path} is damaged ({reason}); give another, or the run's folder for the newest"
            )
        return path
    found = newest_of(steps(path / FOLDER), path / FOLDER, warn, lambda each: damage(each, part="model", hashes=hashes))
    if found is None:
        raise ValueError(f"{path} has no checkpoint; give the folder of a run that has saved one")
    return found


def read(path: Path) -> Checkpoint:
    """Open a checkpoint that `damage` has passed."""
    data = json.loads((path / STATE).read_text(encoding="utf-8"))
    reader = ShardReader(path)
    state = RunState(**data["state"])
    return Checkpoint(state, data["config"], Tensors(reader, "model"), Tensors(reader, "optimizer"), data["mesh"])


def write(folder: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Publish whole tensors from one process, then delete all older ones but the newest `keep` - 1."""
    tensors = {f"model/{name}": entire(value) for name, value in checkpoint.model.items()}
    tensors |= {f"optimizer/{name}": entire(value) for name, value in checkpoint.optimizer.items()}
    save(folder, checkpoint, tensors, None)
    path = folder / name_of(checkpoint.state.step)
    prune(folder, checkpoint.state.step, Keep(keep))
    return path


def save(folder: Path, about: Checkpoint, pieces: Mapping[str, Piece], group: dist.ProcessGroup | None) -> None:
    """Publish this rank's pieces and those of the group's other ranks (a collective), which must not change meanwhile.

    about: whose tensors are left aside. Raises OSError on all ranks, with the first rank's reason; what was there
    before is still there then, and one of the same step gives way only at the end.
    """
    name = name_of(about.state.step)
    staging = folder / f".{name}.partial"

    def finish(index: dict[str, Any], files: dict[str, Any]) -> None:
        data = {"state": dataclasses.asdict(about.state), "config": about.config, "mesh": about.mesh}
        for file, content in ((INDEX, index), (STATE, data)):
            (staging / file).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            digest = {"bytes": (staging / file).stat().st_size, "sha256": sha256_of_file(staging / file)}
            files[file] = digest
        manifest = {"format": FORMAT, "files": dict(sorted(files.items()))}
        (staging / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        for file in (INDEX, STATE, MANIFEST):
            sync_file(staging / file)
        sync_folder(staging)
        publish(staging, folder / name)

    # It says that a process alone is a process alone.
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
    try:
        plan_and_write(
            dict(pieces),
            storage_writer=ShardWriter(staging, finish),
            planner=PiecePlanner(),
            process_group=group,
            no_dist=group is None,
        )
    except CheckpointException as error:
        if group is None or dist.get_rank(group) == 0:
            # What is left of it may be what fills the disk.
            shutil.rmtree(staging, ignore_errors=True)
        rank, (reason, _) = min(error.failures.items(), key=lambda failure: failure[0])
        if not isinstance(reason, Exception):
            # Ctrl-C, which is no failure of the save.
            raise reason from None
        where = f" on rank {rank}" if group is not None and dist.get_world_size(group) > 1 else ""
        raise OSError(f"{sentence(reason)}{where}") from reason


def publish(staging: Path, path: Path) -> None:
    """Give a complete folder its name; one that has it gives way, and is found under `.replaced` in between."""
    replaced = path.with_name(f".{path.name}.replaced")
    if path.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        path.rename(replaced)
    try:
        staging.rename(path)
    except OSError:
        if replaced.exists():
            replaced.rename(path)
        raise
    sync_folder(path.parent)


def prune(folder: Path, step: int, keep: Keep, damaged: Collection[int] = ()) -> None:
    """Delete what is older than `step`, which must be whole, and not to be kept; and what was left half done.

    damaged: steps that are known to be damaged. They do not count, so that `keep.newest` whole ones stay;
    they go, as all others do, once that many whole ones are newer.
    """
    for number, path in steps(folder).items():
        if path.name != name_of(number):
            path.rename(folder / name_of(number))
    upto = [number for number in steps(folder) if number <= step]
    counted = [number for number in upto if number not in damaged][-keep.newest :]
    for number in upto if len(counted) == keep.newest else ():
        if number < counted[0] and (not keep.every or number % keep.every):
            # Out of sight first: a folder that is half deleted must not look like a damaged checkpoint.
            (folder / name_of(number)).rename(folder / f".{name_of(number)}.deleted")
    for path in folder.glob(".step-*.*"):
        shutil.rmtree(path)


def name_of(step: int) -> str:
    return f"step-{step:08}"
