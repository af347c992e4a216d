"""What commands take: the config of a run, checked against its mesh, and the newest checkpoint of a run's folder."""

import sys
from collections.abc import Iterable
from pathlib import Path

import torch

from configs.errors import at
from configs.load import load
from configs.structure import instantiate
from configs.validate import parse
from models.layer import Layer
from parallel import pipeline
from parallel.preflight import refuse
from trainer import checkpoint
from trainer.checkpoint import Checkpoint
from trainer.config import RunConfig
from trainer.resume import FOLDER


def load_run(file: str, overrides: Iterable[str] = ()) -> RunConfig:
    """The config, if its model can be built and its mesh can hold it; nothing is allocated. Raises ConfigError."""
    config = parse(RunConfig, load(file, overrides))
    with torch.device("meta"):
        for letter in config.model.layers:
            try:
                Layer(config.model, config.model.pattern.index(letter))
            except ValueError as error:
                raise at(f"model.layers.{letter}", str(error)) from error
    refuse(config.model, config.mesh)
    if config.mesh.pp > 1:
        pipeline.refuse(config.mesh, len(config.model.expanded), config.micro_batches)
    return config


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
