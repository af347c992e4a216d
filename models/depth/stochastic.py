"""Stochastic depth: a sequence skips layers at random in training, the later ones more often.

    x <- x + b_l F_l(x),    b_l ~ Bernoulli(p_l),    p_l = 1 - (l / L) (1 - p_L),    l = 1 .. L

Both branches of a layer go or stay together. Shape suffixes: B batch, T sequence.
"""

import dataclasses

import torch
from torch import Tensor

from models.context import LayerContext
from models.depth.base import DepthConfig, DepthControl, Gated
from models.noise import uniform_sequences
from models.state import Side, State


@dataclasses.dataclass(frozen=True)
class StochasticDepth(DepthConfig, kind="stochastic"):
    """survival: p_L, the chance of the last layer to run for a sequence. Where nothing is drawn, in evaluation and
    generation, each layer's output is multiplied by its chance instead (Huang et al., arXiv 1603.09382)."""

    survival: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.survival <= 1:
            raise ValueError(
                f"survival is {self.survival}; it is the chance that the last layer runs and must lie in (0, 1]"
            )

    def build(self, ctx: LayerContext) -> DepthControl:
        survival = 1 - (ctx.index + 1) / ctx.num_layers * (1 - self.survival)
        return Survival(survival, kept=1.0, expected=survival)


@dataclasses.dataclass(frozen=True)
class DropPathDepth(StochasticDepth, kind="drop_path"):
    """The same draws, scaled in training: b_l / p_l there, and the whole layer in evaluation and generation, so that
    the model that is evaluated and exported computes what one without it does (DropPath: Larsson et al., arXiv
    1605.07648)."""

    def build(self, ctx: LayerContext) -> DepthControl:
        survival = 1 - (ctx.index + 1) / ctx.num_layers * (1 - self.survival)
        return Survival(survival, kept=1 / survival, expected=1.0)


class Survival(DepthControl):
    """The gate is `kept` for a sequence that keeps the layer, and `expected` where nothing is drawn."""

    peeks = False

    def __init__(self, survival: float, kept: float, expected: float) -> None:
        super().__init__()
        self.survival, self.kept, self.expected = survival, kept, expected

    def forward(self, peek_BTD: Tensor | None, inputs: State, side: Side) -> Gated:
        positions_BT = side.positions_BT
        if side.draws:
            # float64 holds 1 / p to the last digit that any model has.
            kept_B = (uniform_sequences(side, "depth") < self.survival).double() * self.kept
            return Gated(kept_B[:, None].expand_as(positions_BT))
        if self.expected == 1:
            return Gated()
        return Gated(torch.full_like(positions_BT, self.expected, dtype=torch.float64))
