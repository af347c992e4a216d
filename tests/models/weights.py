"""Weights in which no zero or identity of an initialisation hides a path."""

import torch
from torch import nn

from models.params import initialize


def randomize(module: nn.Module, scale: float, ending: str = "") -> None:
    """Initialise a module, and make the parameters whose name ends so normal, with deviation `scale`."""
    initialize(module, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith(ending):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
