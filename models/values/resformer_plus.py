"""Learnable-plus value residual: layers compete for the first layer's values (ResFormer, arXiv 2410.17897).

    V'_l = lambda1_l V_0 + lambda2_l V_l    for l >= 1,    lambda1 = scale softmax(logits) over the layers l >= 1

Shape suffixes: B batch, T sequence, H value heads, V value width.
"""

import dataclasses
from typing import cast

from torch import Tensor, nn

from models.context import LayerContext
from models.params import Constant, declare
from models.slots import Cache, Values, ValuesConfig
from models.state import Side, State, Valued, Views
from models.values.resformer import FIRST, FirstValue, mix_flops


@dataclasses.dataclass(frozen=True)
class PlusResFormerValues(ValuesConfig, kind="resformer_plus"):
    """One softmax over all layers shares out the first layer's values; its scale is learned too, from the number of
    layers on. A layer's own values have a learned scalar each.

    lambda2: where those scalars start.
    """

    lambda2: float = 0.5

    crosses_layers = True

    def build(self, ctx: LayerContext, value_shape: tuple[int, int]) -> Values:
        if ctx.index == 0:
            return FirstValue(value_shape)
        shares = ctx.share("value shares", lambda: Shares(ctx.num_layers))
        return SharedMix(shares, ctx.index, self.lambda2)


class Shares(nn.Module):
    """The lambda1 of all layers, by layer."""

    logits: nn.Parameter
    scale: nn.Parameter

    def __init__(self, num_layers: int) -> None:
        super().__init__()
        declare(self, "logits", (num_layers - 1,), Constant(0.0))
        declare(self, "scale", (1,), Constant(float(num_layers)))

    def forward(self, index: int) -> Tensor:
        """Shape [1]."""
        return self.scale * self.logits.softmax(0)[index - 1]


class SharedMix(Values):
    reads = (FIRST,)
    lambda2: nn.Parameter

    def __init__(self, shares: Shares, index: int, lambda2: float) -> None:
        super().__init__()
        self.shares, self.index = shares, index
        declare(self, "lambda2", (1,), Constant(lambda2))

    def forward(self, v_BTHV: Tensor, views: Views, inputs: State, side: Side, cache: Cache | None) -> Valued:
        lambda1 = cast(Tensor, self.shares(self.index))
        return Valued(lambda1 * inputs[FIRST] + self.lambda2 * v_BTHV)

    def flops_per_token(self, value_shape: tuple[int, int]) -> float:
        return mix_flops(value_shape)
