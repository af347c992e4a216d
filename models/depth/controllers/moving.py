"""Controllers whose prices move with the distance from the targets: the part that they share.

Shape suffixes: L layers.
"""

import dataclasses

import torch
from torch import Tensor

from models.depth.controllers.targets import TargetController
from models.limits import at_least


@dataclasses.dataclass(frozen=True)
class MovingController(TargetController):
    """A price moves while its statistic is further from the target than `tolerance`, and stays between `lowest` and
    `highest` (null: no limit)."""

    tolerance: float = 0.01
    lowest: float | None = None
    highest: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 0, "tolerance")
        if self.lowest is not None and self.highest is not None and self.lowest > self.highest:
            raise ValueError(f"lowest {self.lowest} is above highest {self.highest}; swap them")

    def move(self, distance_L: Tensor, short_L: Tensor, long_L: Tensor) -> Tensor:
        """The step outside the tolerance."""
        raise NotImplementedError

    def step(self, distance_L: Tensor, short_L: Tensor, long_L: Tensor) -> Tensor:
        return torch.where(distance_L.abs() > self.tolerance, self.move(distance_L, short_L, long_L), 0)

    def bound(self, coef_L: Tensor) -> Tensor:
        return coef_L if self.lowest is None and self.highest is None else coef_L.clamp(self.lowest, self.highest)
