"""SVFormer: all layers take the first layer's values and make none (arXiv 2410.17897).

In decoding the first layer keeps the values of all tokens so far, and hands them on whole: no other layer keeps any.
Shape suffixes: B batch, T sequence, S = T and, in decoding, all tokens before, H value heads, V value width.
"""

import dataclasses

import torch
from torch import Tensor

from models.context import LayerContext
from models.slots import Cache, Values, ValuesConfig
from models.state import Entry, Layout, Side, State, Valued, Views
from models.values.resformer import FIRST


@dataclasses.dataclass(frozen=True)
class SVFormerValues(ValuesConfig, kind="svformer"):
    """V_l = V_0: layers after the first have no projection of values, and half the decode cache."""

    crosses_layers = True

    def build(self, ctx: LayerContext, value_shape: tuple[int, int]) -> Values:
        return KeptValue(value_shape) if ctx.index == 0 else BorrowedValue()


class KeptValue(Values):
    """The first layer: its values go on to all layers."""

    def __init__(self, value_shape: tuple[int, int]) -> None:
        super().__init__()
        self.writes = (Entry(FIRST, value_shape, Layout.HEADS, heads=value_shape[0]),)

    def forward(self, v_BTHV: Tensor, views: Views, inputs: State, side: Side, cache: Cache | None) -> Valued:
        if cache is None:
            return Valued(v_BTHV, {FIRST: v_BTHV})
        all_BSHV = torch.cat([cache[FIRST], v_BTHV], 1) if cache else v_BTHV
        return Valued(v_BTHV, {FIRST: all_BSHV}, {FIRST: all_BSHV}, all_BSHV)


class BorrowedValue(Values):
    own = False
    reads = (FIRST,)

    def forward(self, v_BTHV: Tensor, views: Views, inputs: State, side: Side, cache: Cache | None) -> Valued:
        if cache is None:
            return Valued(inputs[FIRST])
        all_BSHV, length = inputs[FIRST], views.v_BTD.shape[1]
        return Valued(all_BSHV[:, -length:], all_BSHV=all_BSHV)
