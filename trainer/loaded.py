"""A run's model as one process uses it: whole, on this machine's device."""

import sys
from pathlib import Path

import torch

from configs.structure import instantiate
from models.lm import LM
from trainer import checkpoint
from trainer.config import RunConfig
from trainer.process import device_type


def load_whole(folder: Path) -> tuple[RunConfig, LM, Path]:
    """The config, the model and the checkpoint that were chosen of a run's folder, or of the checkpoint that it is.

    Warns of damaged ones that are passed over. Raises ValueError where none is whole.
    """
    path = checkpoint.choose(folder, lambda text: print(f"weft: warning: {text}", file=sys.stderr))
    content = checkpoint.read(path)
    config: RunConfig = instantiate(RunConfig, content.config)
    with torch.device("meta"):
        model = LM(config.model)
    model.load_state_dict(dict(content.model), assign=True)
    return config, model.to(device_type()).eval(), path
