"""Value residual: every layer adds the first layer's values to its own (ResFormer, arXiv 2410.17897).

    V'_0 = V_0,    V'_l = lambda1 V_0 + lambda2 V_l    for l >= 1

V_0 is the raw first value, not a mixed one, and is not detached: every layer's gradient reaches the first projection.
Shape suffixes: B batch, T sequence, H value heads, V value width.
"""

import dataclasses
import math
from typing import ClassVar

from torch import Tensor, nn

from models.context import LayerContext
from models.params import Constant, declare
from models.slots import Cache, Values, ValuesConfig
from models.state import Entry, Layout, Side, State, Valued, Views

FIRST = "first_value"


@dataclasses.dataclass(frozen=True)
class ResFormerValues(ValuesConfig, kind="resformer"):
    """Constant weights, equal in all layers; the paper's "identity" variant is 0.5 and 0.5."""

    lambda1: float = 0.5
    lambda2: float = 0.5

    crosses_layers: ClassVar[bool] = True

    def build(self, ctx: LayerContext, value_shape: tuple[int, int]) -> Values:
        return FirstValue(value_shape) if ctx.index == 0 else ConstantMix(self.lambda1, self.lambda2)


@dataclasses.dataclass(frozen=True)
class LearnableResFormerValues(ResFormerValues, kind="resformer_learnable"):
    """Two learned scalars per layer, which start at lambda1 and lambda2."""

    def build(self, ctx: LayerContext, value_shape: tuple[int, int]) -> Values:
        return FirstValue(value_shape) if ctx.index == 0 else LearnedMix(self.lambda1, self.lambda2)


def mix_flops(value_shape: tuple[int, int]) -> float:
    """Per token, of the weighted sum of the first layer's values and a layer's own."""
    return 2 * 2 * math.prod(value_shape)


class FirstValue(Values):
    """The first layer: passes its values on and uses them as they are."""

    def __init__(self, value_shape: tuple[int, int]) -> None:
        super().__init__()
        self.writes = (Entry(FIRST, value_shape, Layout.HEADS, heads=value_shape[0]),)

    def forward(self, v_BTHV: Tensor, views: Views, inputs: State, side: Side, cache: Cache | None) -> Valued:
        return Valued(v_BTHV, {FIRST: v_BTHV})


class ConstantMix(Values):
    reads = (FIRST,)

    def __init__(self, lambda1: float, lambda2: float) -> None:
        super().__init__()
        self.lambda1, self.lambda2 = lambda1, lambda2

    def forward(self, v_BTHV: Tensor, views: Views, inputs: State, side: Side, cache: Cache | None) -> Valued:
        return Valued(self.lambda1 * inputs[FIRST] + self.lambda2 * v_BTHV)

    def flops_per_token(self, value_shape: tuple[int, int]) -> float:
        return mix_flops(value_shape)


class LearnedMix(Values):
    reads = (FIRST,)

    def __init__(self, lambda1: float, lambda2: float) -> None:
        super().__init__()
        self.lambda1: nn.Parameter
        self.lambda2: nn.Parameter
        declare(self, "lambda1", (1,), Constant(lambda1))
        declare(self, "lambda2", (1,), Constant(lambda2))

    def forward(self, v_BTHV: Tensor, views: Views, inputs: State, side: Side, cache: Cache | None) -> Valued:
        return Valued(self.lambda1 * inputs[FIRST] + self.lambda2 * v_BTHV)

    def flops_per_token(self, value_shape: tuple[int, int]) -> float:
        return mix_flops(value_shape)
