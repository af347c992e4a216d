"""The config of a run, and every refusal that needs no process group: of the model, its mesh and the data's files."""

from collections.abc import Iterable
from pathlib import Path

import torch

from configs.errors import at
from configs.load import load
from configs.validate import parse
from models.layer import Layer
from parallel import pipeline
from parallel.preflight import refuse
from trainer.config import RunConfig
from trainer.data.check import open_data
from trainer.loop import refuse_vocabulary


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


def refuse_data(config: RunConfig) -> None:
    """Raise ConfigError where a file of the data is missing, and ValueError where they do not fit the model."""
    for name, prefix in (("train", config.data.train), ("valid", config.data.valid)):
        if prefix is not None:
            refuse_missing(f"data.{name}", name, prefix)
            open_data(prefix)
    tokenizer = config.data.tokenizer
    if tokenizer is not None and not Path(tokenizer).exists():
        raise at("data.tokenizer", f"{tokenizer} does not exist; give the tokenizer.model that weft prepare wrote")
    refuse_vocabulary(config)


def refuse_missing(key: str, name: str, prefix: str) -> None:
    """A dataset is two files; weft prepare writes one called train and one called valid into its folder."""
    for suffix in (".bin", ".idx"):
        if Path(prefix + suffix).is_file():
            continue
        inside = Path(prefix) / name
        if inside.with_name(f"{name}.idx").is_file():
            raise at(key, f"{prefix} is a folder; give the dataset in it, {inside}")
        raise at(key, f"{prefix}{suffix} does not exist; make it with weft prepare {Path(prefix).parent} SOURCE ...")
