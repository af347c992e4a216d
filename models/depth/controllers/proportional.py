"""Prices that move in proportion to the distance from the target.

Shape suffixes: L layers.
"""

import dataclasses
from types import MappingProxyType

from torch import Tensor

from models.depth.controllers.moving import MovingController
from models.limits import above_zero


@dataclasses.dataclass(frozen=True)
class ProportionalController(MovingController, kind="proportional"):
    """price += rate distance (what the paper's runs used)."""

    rate: float = 1e-3

    example = MappingProxyType({"middle": 0.3})

    def __post_init__(self) -> None:
        super().__post_init__()
        above_zero(self, "rate")

    def move(self, distance_L: Tensor, short_L: Tensor, long_L: Tensor) -> Tensor:
        return self.rate * distance_L
