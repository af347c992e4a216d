"""Prices that move in proportion to the distance from the target, but not while it shrinks by itself.

Shape suffixes: L layers.
"""

import dataclasses
from types import MappingProxyType

import torch
from torch import Tensor

from models.depth.controllers.moving import MovingController
from models.limits import above_zero


@dataclasses.dataclass(frozen=True)
class ProportionalDerivativeController(MovingController, kind="proportional_derivative"):
    """price += rate distance, where distance x (its short average - its long average) is above `slope`."""

    rate: float = 1e-2
    slope: float = 0.0

    example = MappingProxyType({"middle": 0.3})

    def __post_init__(self) -> None:
        super().__post_init__()
        above_zero(self, "rate")

    def move(self, distance_L: Tensor, short_L: Tensor, long_L: Tensor) -> Tensor:
        return torch.where(distance_L * (short_L - long_L) > self.slope, self.rate * distance_L, 0)
