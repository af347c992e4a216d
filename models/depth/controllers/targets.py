"""Controllers that know what the gates should be: the part that they share.

Shape suffixes: L layers.
"""

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from models.depth.controllers.base import GateController, Levels
from models.limits import at_least


@dataclasses.dataclass(frozen=True)
class TargetController(GateController):
    """A mean for each layer's gates, mirrored in the second half: `targets`, or from `first` at the outermost layer in
    equal steps to `middle`. The variance's target is that of a coin, mean (1 - mean), plus `var_offset`.

    ema_short, ema_long: steps over which the distance from the targets is averaged.
    """

    first: float = 1.0
    middle: float = 0.5
    targets: tuple[float, ...] | None = None
    var_offset: float = 0.0
    ema_short: float = 1.0
    ema_long: float = 10.0

    def __post_init__(self) -> None:
        at_least(self, 1, "ema_short", "ema_long", hint=" step")
        for name, targets in (("first", (self.first,)), ("middle", (self.middle,)), ("targets", self.targets or ())):
            for target in targets:
                if not 0 <= target <= 1:
                    raise ValueError(f"{name} has a target of {target}; gates lie between 0 and 1, so must it")

    def levels(self) -> Mapping[str, float]:
        averages = [f"{what}_{span}" for what in ("mean", "var") for span in ("short", "long")]
        return {**super().levels(), **dict.fromkeys(averages, 0.0), "steps": 0.0}

    def check_layers(self, num_layers: int) -> None:
        if self.targets is not None and 2 * len(self.targets) != num_layers:
            raise ValueError(
                f"targets has {len(self.targets)} numbers, and {num_layers} layers share {num_layers // 2} gates; "
                "give one for each, from the first layer to the middle, or null for equal steps"
            )

    def targets_of(self, like_L: Tensor) -> tuple[Tensor, Tensor]:
        """(mean, variance) that each layer's gates should have."""
        half = like_L.shape[0] // 2
        if self.targets is None:
            half_L = torch.linspace(self.first, self.middle, half, dtype=like_L.dtype, device=like_L.device)
        else:
            half_L = like_L.new_tensor(self.targets)
        mean_L = torch.cat([half_L, half_L.flip(0)])
        return mean_L, (mean_L * (1 - mean_L) + self.var_offset).clamp_min(0)

    def step(self, distance_L: Tensor, short_L: Tensor, long_L: Tensor) -> Tensor:
        """What is added to a price whose statistic is that far from its target, now and on average."""
        return torch.zeros_like(distance_L)

    def bound(self, coef_L: Tensor) -> Tensor:
        return coef_L

    def update(self, levels: Levels, mean_L: Tensor, var_L: Tensor) -> Levels:
        new = {"steps": levels["steps"] + 1}
        for what, value_L, target_L in zip(("mean", "var"), (mean_L, var_L), self.targets_of(mean_L), strict=True):
            distance_L = value_L - target_L
            for span, steps in (("short", self.ema_short), ("long", self.ema_long)):
                old_L = torch.where(levels["steps"] > 0, levels[f"{what}_{span}"], distance_L)
                new[f"{what}_{span}"] = old_L + (distance_L - old_L) / steps
            step_L = self.step(distance_L, new[f"{what}_short"], new[f"{what}_long"])
            new[f"{what}_coef"] = self.bound(levels[f"{what}_coef"] + step_L)
        return new
