"""Masks that keep two of four along both dimensions."""

import torch
from torch import Tensor

from trainer.sparsity.masks import transposable


def run(inputs: dict[str, Tensor], params: dict[str, Tensor], config: dict) -> dict[str, Tensor]:
    weight = inputs["weight"]
    mask = transposable(weight.detach().abs() if config["abs"] else weight.detach())
    return {"mask": mask.to(torch.uint8), "sparse": weight * mask}
