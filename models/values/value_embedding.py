"""Value embeddings: learned values that a token has whatever its context, from tables with a row per token id.

Every rank looks up its own heads' part of a row; nothing crosses layers but the tables that they share.
Shape suffixes: B batch, T sequence, D model width, H value heads, V value width.
"""

import dataclasses
import math
from types import MappingProxyType
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from models.context import LayerContext
from models.limits import above_zero, at_least
from models.params import Axis, Constant, Linear, Normal, declare, upcast
from models.slots import Cache, Values, ValuesConfig
from models.state import Side, State, Valued, Views


@dataclasses.dataclass(frozen=True)
class ValueEmbedding(ValuesConfig, kind="value_embedding"):
    """V'_l = lambda1 E_i[token] + lambda2 V_l with learned scalars, as in modded-nanogpt: table i serves layer i and
    the i-th of as many layers at the end, if their values are of one shape; the layers between have none.

    tables: how many. lambda1, lambda2: where the scalars start.
    """

    tables: int = 3
    lambda1: float = 0.5
    lambda2: float = 0.5

    example = MappingProxyType({"tables": 1})

    def __post_init__(self) -> None:
        at_least(self, 1, "tables")

    def build(self, ctx: LayerContext, value_shape: tuple[int, int]) -> Values:
        if 2 * self.tables > ctx.num_layers:
            raise ValueError(
                f"tables is {self.tables}: each serves two layers, and there are {ctx.num_layers}; "
                f"use at most {ctx.num_layers // 2}, or {2 * self.tables} layers"
            )
        from_end = ctx.index - (ctx.num_layers - self.tables)
        table = ctx.index if ctx.index < self.tables else from_end
        if table < 0:
            return Values()
        shared = ctx.share(f"value table {table} of {value_shape}", lambda: Table(ctx, value_shape))
        return EmbeddedMix(shared, self.lambda1, self.lambda2)


@dataclasses.dataclass(frozen=True)
class GatedValueEmbedding(ValuesConfig, kind="value_embedding_gated"):
    """V'_l = V_l + g E_l[token] in every second layer, the last one among them, as in nanochat: a table for each, and
    g = gate_range sigmoid(W x) per head of the first channels x of the values' input; W starts at 0.

    channels: how many of them. gate_range: the largest g.
    """

    channels: int = 12
    gate_range: float = 3.0

    def __post_init__(self) -> None:
        at_least(self, 1, "channels")
        above_zero(self, "gate_range", hint=", and 3 is usual")

    def build(self, ctx: LayerContext, value_shape: tuple[int, int]) -> Values:
        if self.channels > ctx.d_model:
            raise ValueError(f"values.channels is {self.channels}; d_model is {ctx.d_model}, so use at most that many")
        if (ctx.num_layers - 1 - ctx.index) % 2:
            return Values()
        return GatedEmbedding(Table(ctx, value_shape), value_shape[0], self.channels, self.gate_range)


class Table(nn.Module):
    """E [vocabulary, H V]: its rows start as large as the values that a projection makes of a normed input."""

    weight: nn.Parameter

    def __init__(self, ctx: LayerContext, value_shape: tuple[int, int]) -> None:
        super().__init__()
        heads, self.width = value_shape
        axes, init = (None, Axis("kv_heads", heads)), Normal(0.02 * math.sqrt(ctx.d_model))
        declare(self, "weight", (ctx.vocab_size, heads * self.width), init, axes, role="embedding")

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """[B, T, H, V]."""
        return F.embedding(tokens_BT, self.weight).unflatten(-1, (-1, self.width))


class EmbeddedMix(Values):
    lambda1: nn.Parameter
    lambda2: nn.Parameter

    def __init__(self, table: Table, lambda1: float, lambda2: float) -> None:
        super().__init__()
        self.table = table
        declare(self, "lambda1", (1,), Constant(lambda1))
        declare(self, "lambda2", (1,), Constant(lambda2))

    def forward(self, v_BTHV: Tensor, views: Views, inputs: State, side: Side, cache: Cache | None) -> Valued:
        embedded_BTHV = cast(Tensor, self.table(side.tokens_BT))
        return Valued(self.lambda1 * embedded_BTHV + self.lambda2 * v_BTHV)


class GatedEmbedding(Values):
    def __init__(self, table: Table, heads: int, channels: int, gate_range: float) -> None:
        super().__init__()
        self.table, self.channels, self.gate_range = table, channels, gate_range
        self.gate = Linear(channels, heads, axis=Axis("kv_heads", heads), init=Constant(0.0), role="gate", wide=False)

    def forward(self, v_BTHV: Tensor, views: Views, inputs: State, side: Side, cache: Cache | None) -> Valued:
        gate_BTH = self.gate_range * upcast(self.gate(views.v_BTD[..., : self.channels])).sigmoid()
        return Valued(v_BTHV + gate_BTH.to(v_BTHV.dtype)[..., None] * self.table(side.tokens_BT))
