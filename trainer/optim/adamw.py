"""AdamW, torch's own, over the local pieces of all parameters.

Source: Loshchilov & Hutter, arXiv 1711.05101.
"""

import dataclasses
import itertools
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from models.limits import above_zero
from parallel.gradients import Held
from trainer.optim.base import OptimConfig, Optimizer, Setting, local

if TYPE_CHECKING:
    from parallel.engine import Engine

FUSED = ("cpu", "cuda")


@dataclasses.dataclass(frozen=True)
class AdamWConfig(OptimConfig, kind="adamw"):
    """AdamW (Loshchilov & Hutter, arXiv 1711.05101).

    betas: decay of the averages of the gradient and of its square. eps: added to the square root of the latter.
    """

    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8

    def __post_init__(self) -> None:
        super().__post_init__()
        check_moments(self)

    def build(self, engine: "Engine") -> Optimizer:
        return AdamW(engine, self)


class Moments(Protocol):
    """The settings of AdamW's averages."""

    @property
    def betas(self) -> tuple[float, float]: ...

    @property
    def eps(self) -> float: ...


def check_moments(config: Moments) -> None:
    """Raise ValueError for averages that cannot be."""
    for beta in config.betas:
        if not 0 <= beta < 1:
            raise ValueError(f"betas is {list(config.betas)}; both must lie in [0, 1), such as [0.9, 0.95]")
    above_zero(config, "eps", hint=", and 1e-8 is usual")


def first_moments(own: Tensor) -> dict[str, Tensor]:
    """step: updates so far. exp_avg, exp_avg_sq: like `own`, this rank's part of a parameter."""
    step = torch.zeros((), dtype=torch.float32, device=own.device)
    return {"step": step, "exp_avg": torch.zeros_like(own), "exp_avg_sq": torch.zeros_like(own)}


def adamw_update(
    optimizer: Optimizer, parameters: list[Held], lr: float, betas: tuple[float, float], eps: float
) -> None:
    """One update of `parameters`, whose state is that of `first_moments`: one call for all that share a setting."""

    def key(held: Held) -> tuple[float, float, float]:
        setting: Setting = optimizer.setting(held)
        return setting.lr_scale, setting.weight_decay, setting.eps_scale

    # A rank may hold nothing of a small parameter; its count of updates goes on as on all ranks.
    pieces = [held for held in parameters if local(held.parameter).numel()]
    for held in parameters:
        if not local(held.parameter).numel():
            optimizer.state(held)["step"].add_(1)
    for (lr_scale, weight_decay, eps_scale), group in itertools.groupby(sorted(pieces, key=key), key):
        same = list(group)
        states = [optimizer.state(held) for held in same]
        fused = local(same[0].parameter).device.type in FUSED
        adamw(
            [local(held.parameter) for held in same],
            [held.gradient for held in same],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            foreach=not fused,
            fused=fused,
            amsgrad=False,
            beta1=betas[0],
            beta2=betas[1],
            lr=lr * lr_scale,
            weight_decay=weight_decay,
            eps=eps * eps_scale,
            maximize=False,
        )


class AdamW(Optimizer):
    """Every parameter by AdamW."""

    def __init__(self, engine: "Engine", config: AdamWConfig) -> None:
        super().__init__(engine, config)
        self.config = config

    def first_state(self, held: Held) -> dict[str, Tensor]:
        return first_moments(local(held.parameter))

    def update(self, held: list[Held], lr: float) -> None:
        adamw_update(self, held, lr, self.config.betas, self.config.eps)
