"""What commands take: the config of a run, checked against its mesh, and the newest checkpoint of a run's folder."""

import sys
from pathlib import Path

from configs.load import load
from configs.structure import instantiate
from configs.validate import parse
from trainer import checkpoint
from trainer.checkpoint import Checkpoint
from trainer.config import RunConfig
from trainer.preflight import load_model, load_run
from trainer.resume import FOLDER

__all__ = ["load_model", "load_run", "newest_checkpoint", "run_folder"]


def run_folder(path: str) -> Path:
    """The folder of a run, which is given itself or by the run's config."""
    return Path(parse(RunConfig, load(path)).run.dir) if Path(path).is_file() else Path(path)


def newest_checkpoint(folder: Path) -> tuple[RunConfig, Checkpoint, Path]:
    """Of a run's folder. Raises ValueError where there is none."""
    path = checkpoint.newest(folder / FOLDER, lambda sentence: print(f"weft: warning: {sentence}", file=sys.stderr))
    if path is None:
        raise ValueError(f"{folder} has no checkpoint; give the folder of a run that has saved one")
    content = checkpoint.read(path)
    return instantiate(RunConfig, content.config), content, path
