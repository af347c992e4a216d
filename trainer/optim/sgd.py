"""Stochastic gradient descent with momentum: v <- m v + g, w <- w - lr v, and decoupled weight decay."""

import dataclasses
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from parallel.gradients import Held
from trainer.optim.base import OptimConfig, Optimizer, local

if TYPE_CHECKING:
    from parallel.engine import Engine

VELOCITY = "momentum_buffer"  # as torch's own names it


@dataclasses.dataclass(frozen=True)
class SGDConfig(OptimConfig, kind="sgd"):
    """momentum: the share of the velocity that is kept at each update."""

    momentum: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum is {self.momentum}; it must lie in [0, 1), such as 0.9")

    def build(self, engine: "Engine") -> Optimizer:
        return SGD(engine, self)


class SGD(Optimizer):
    """Every parameter by SGD."""

    def __init__(self, engine: "Engine", config: SGDConfig) -> None:
        super().__init__(engine, config)
        self.config = config

    def first_state(self, held: Held) -> dict[str, Tensor]:
        return {VELOCITY: torch.zeros_like(local(held.parameter))}

    def update(self, held: list[Held], lr: float) -> None:
        for one in held:
            setting, weight = self.setting(one), local(one.parameter)
            velocity = self.state(one)[VELOCITY].mul_(self.config.momentum).add_(one.gradient)
            weight.mul_(1 - lr * setting.lr_scale * setting.weight_decay).add_(velocity, alpha=-lr * setting.lr_scale)
