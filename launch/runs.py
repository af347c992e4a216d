"""What commands take: the config of a run, checked against its mesh, and the newest checkpoint of a run's folder."""

import sys
from pathlib import Path

from configs.load import load
from configs.structure import instantiate
from configs.validate import parse
from trainer import checkpoint
from trainer.checkpoint import FOLDER, Checkpoint
from trainer.config import RunConfig
from trainer.preflight import load_memory, load_model, load_optim, load_run

__all__ = ["checkpoints", "load_memory", "load_model", "load_optim", "load_run", "newest_checkpoint", "run_folder"]


def run_folder(path: str) -> Path:
    """The folder of a run, which is given itself or by the run's config."""
    return Path(parse(RunConfig, load(path)).run.dir) if Path(path).is_file() else Path(path)


def newest_checkpoint(path: Path) -> tuple[RunConfig, Checkpoint, Path]:
    """Of a run's folder; or the checkpoint that the path is. Raises ValueError where there is none that is whole."""
    chosen = checkpoint.choose(path, lambda sentence: print(f"weft: warning: {sentence}", file=sys.stderr))
    content = checkpoint.read(chosen)
    return instantiate(RunConfig, content.config), content, chosen


def checkpoints(given: str) -> dict[int, Path]:
    """All of a run by step, whole or not; or the one that is given. Raises ValueError where there is none."""
    path = run_folder(given)
    if match := checkpoint.NAME.fullmatch(path.name):
        found = {int(match[1]): path} if path.is_dir() else {}
    else:
        found = checkpoint.steps(path / FOLDER)
    if not found:
        raise ValueError(f"{given} has no checkpoint; give the folder of a run that has saved one, or a checkpoint's")
    return found
