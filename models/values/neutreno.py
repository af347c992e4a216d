"""NeuTRENO: what attention smooths away is added back from the first layer's values (arXiv 2312.00751).

    out_l = core(V_l) + strength (V_0 - V_l)    for l >= 1

Where several query heads share a value head, each of them is given its difference.
Shape suffixes: B batch, T sequence, H heads, J value heads, V value width.
"""

import dataclasses
import math

from torch import Tensor

from models.context import LayerContext
from models.slots import Cache, Values, ValuesConfig
from models.state import Side, State, Valued, Views
from models.values.resformer import FIRST, FirstValue, mix_flops


@dataclasses.dataclass(frozen=True)
class NeutrenoValues(ValuesConfig, kind="neutreno"):
    """NeuTRENO (Nguyen et al., arXiv 2312.00751). strength: of the difference; 0.4 in the comparisons of ResFormer's
    authors."""

    strength: float = 0.4

    crosses_layers = True
    changes = False

    def build(self, ctx: LayerContext, value_shape: tuple[int, int]) -> Values:
        return FirstValue(value_shape) if ctx.index == 0 else Restored(self.strength)


@dataclasses.dataclass(frozen=True)
class NeutrenoResFormerValues(ValuesConfig, kind="neutreno_resformer"):
    """NeuTRENO over ResFormer: V_l above is the mix lambda1 V_0 + lambda2 V_l (arXiv 2410.17897, as in its code)."""

    strength: float = 0.4
    lambda1: float = 0.5
    lambda2: float = 0.5

    crosses_layers = True

    def build(self, ctx: LayerContext, value_shape: tuple[int, int]) -> Values:
        return FirstValue(value_shape) if ctx.index == 0 else RestoredMix(self.lambda1, self.lambda2, self.strength)


class Restored(Values):
    reads = (FIRST,)

    def __init__(self, strength: float) -> None:
        super().__init__()
        self.strength = strength

    def after(self, out_BTHV: Tensor, v_BTJV: Tensor, inputs: State) -> Tensor:
        lost_BTJV = inputs[FIRST] - v_BTJV
        lost_BTHV = lost_BTJV.repeat_interleave(out_BTHV.shape[2] // lost_BTJV.shape[2], 2)
        return out_BTHV + self.strength * lost_BTHV

    def flops_per_token(self, value_shape: tuple[int, int]) -> float:
        """One weight for the difference, which is a plain one."""
        return 2 * math.prod(value_shape)


class RestoredMix(Restored):
    def __init__(self, lambda1: float, lambda2: float, strength: float) -> None:
        super().__init__(strength)
        self.lambda1, self.lambda2 = lambda1, lambda2

    def forward(self, v_BTHV: Tensor, views: Views, inputs: State, side: Side, cache: Cache | None) -> Valued:
        return Valued(self.lambda1 * inputs[FIRST] + self.lambda2 * v_BTHV)

    def flops_per_token(self, value_shape: tuple[int, int]) -> float:
        return super().flops_per_token(value_shape) + mix_flops(value_shape)
