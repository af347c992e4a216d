"""MUDD connections: a layer's query, key, value and residual inputs are mixed, per token, from all earlier outputs.

Shape suffixes: B batch, T sequence, D model width, C ways, J sources (outputs so far, the embedding among them),
K hidden width of the generator.
"""

import dataclasses
import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.context import LayerContext
from models.limits import above_zero, at_least
from models.params import Constant, Linear, Normal, declare, upcast
from models.slots import Closer, Connection, Opener, ResidualConfig
from models.state import Entry, State, Views


@dataclasses.dataclass(frozen=True)
class MUDDConnections(ResidualConfig, kind="mudd"):
    """Multiway dynamic dense connections (Xiao et al., arXiv 2502.12170, section 2). Starts as the plain residual.

    separate_norms: the query, key and value inputs have a norm each. hidden_round: r makes the generator's hidden
    width K into (K // r + 1) * r, as the released models do with 64. expand_last: factor on K at the model's end,
    4 in the released models. eps: of the generator's norm.
    """

    separate_norms: bool = True
    hidden_round: int | None = None
    expand_last: int = 1
    eps: float = 1e-6

    takes_shortcut = False
    starts_plain = True

    def __post_init__(self) -> None:
        at_least(self, 1, "hidden_round", hint=", or null for no rounding")
        at_least(self, 1, "expand_last")
        above_zero(self, "eps", hint=", and 1e-6 is usual")

    def hidden(self, ways: int, sources: int) -> int:
        hidden = ways * sources * (self.expand_last if ways == 1 else 1)
        return hidden if self.hidden_round is None else (hidden // self.hidden_round + 1) * self.hidden_round

    def aggregate(self, d_model: int, ways: int, sources: int) -> "DepthAggregate":
        return DepthAggregate(d_model, ways, sources, self.hidden(ways, sources), self.eps)

    def connect(self, ctx: LayerContext, branch: Literal["mixer", "ffn"], shortcut: nn.Module) -> Connection:
        if branch == "ffn":
            return BlockEnd(ctx.d_model, ctx.index)
        if ctx.index == 0:
            return FirstBlockStart(ctx.d_model)
        return BlockStart(self, ctx)

    def open(self, d_model: int) -> Opener:
        return PastOpener(d_model)

    def close(self, d_model: int, num_layers: int) -> Closer:
        return PastCloser(self.aggregate(d_model, 1, num_layers + 1))


def past(index: int) -> str:
    """The entry with the output of layer index - 1, which for 0 is the embedding."""
    return f"past.{index}"


@dataclasses.dataclass(frozen=True)
class Newest:
    """[C, J]: each way is the newest source alone, which is the plain residual."""

    def __call__(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        ways, sources = shape
        return torch.eye(sources)[-1].expand(ways, sources).clone()


class DepthAggregate(nn.Module):
    """w = GELU(norm(X_newest) W1) W2 + a, and out_c = sum_j w[c, j] X_j; the norm is an RMSNorm without weight."""

    static: nn.Parameter

    def __init__(self, d_model: int, ways: int, sources: int, hidden: int, eps: float) -> None:
        super().__init__()
        self.ways, self.eps = ways, eps
        self.down = Linear(d_model, hidden, init=Normal(1 / math.sqrt(d_model)), role="gate")
        self.up = Linear(hidden, ways * sources, init=Constant(0.0), role="gate")
        declare(self, "static", (ways, sources), Newest(), decay=False)

    def weights(self, newest_BTD: Tensor) -> Tensor:
        """Returns [B, T, C, J], in at least float32."""
        hidden_BTK = F.gelu(self.down(F.rms_norm(newest_BTD, newest_BTD.shape[-1:], eps=self.eps)))
        return upcast(self.up(hidden_BTK)).unflatten(-1, (self.ways, -1)) + self.static

    def forward(self, sources: list[Tensor]) -> list[Tensor]:
        """sources: J tensors [B, T, D], oldest first. Returns C of them."""
        newest_BTD = sources[-1]
        return [self.mix(sources, w_BTJ).to(newest_BTD.dtype) for w_BTJ in self.weights(newest_BTD).unbind(-2)]

    def mix(self, sources: list[Tensor], w_BTJ: Tensor) -> Tensor:
        # One addition after another: for one product the sources would have to be stacked, and every layer would keep
        # that copy for its backward, where addcmul keeps the sources themselves.
        w_BT1 = w_BTJ.unsqueeze(-2).unbind(-1)
        mixed_BTD = sources[0] * w_BT1[0]
        for source_BTD, w in zip(sources[1:], w_BT1[1:], strict=True):
            mixed_BTD = torch.addcmul(mixed_BTD, source_BTD, w)
        return mixed_BTD


class BlockStart(Connection):
    """A mixer's connection: four ways, for the queries, the keys, the values, and what the layer is added to."""

    def __init__(self, config: MUDDConnections, ctx: LayerContext) -> None:
        super().__init__()
        self.reads = tuple(past(j) for j in range(ctx.index + 1))
        self.writes = (Entry("x", (ctx.d_model,)),)
        self.num_views = 3 if config.separate_norms else 1
        self.aggregate = config.aggregate(ctx.d_model, 4, ctx.index + 1)

    def read(self, state: State) -> tuple[Views, State]:
        q_BTD, k_BTD, v_BTD, r_BTD = self.aggregate([state[name] for name in self.reads])
        return Views(q_BTD, k_BTD, v_BTD), {"residual": r_BTD}

    def write(self, state: State, kept: State, out_BTD: Tensor) -> State:
        return {**state, "x": kept["residual"] + out_BTD}

    def peek(self, state: State) -> Tensor:
        """The newest output."""
        return state[self.reads[-1]]


class FirstBlockStart(Connection):
    """The first mixer's connection: there is nothing but the embedding to mix."""

    reads = (past(0),)

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.writes = (Entry("x", (d_model,)),)

    def read(self, state: State) -> tuple[Views, State]:
        return Views.same(state[past(0)]), {}

    def write(self, state: State, kept: State, out_BTD: Tensor) -> State:
        return {**state, "x": state[past(0)] + out_BTD}

    def peek(self, state: State) -> Tensor:
        return state[past(0)]


class BlockEnd(Connection):
    """An FFN's connection: plain within the layer, and its sum is one more source for the layers behind it."""

    reads = ("x",)

    def __init__(self, d_model: int, index: int) -> None:
        super().__init__()
        self.output = past(index + 1)
        self.writes = (Entry(self.output, (d_model,)),)

    def read(self, state: State) -> tuple[Views, State]:
        return Views.same(state["x"]), {}

    def write(self, state: State, kept: State, out_BTD: Tensor) -> State:
        return {**state, self.output: state["x"] + out_BTD}


class PastOpener(Opener):
    def __init__(self, d_model: int) -> None:
        super().__init__(d_model)
        self.writes = (Entry(past(0), (d_model,)),)

    def forward(self, x_BTD: Tensor) -> State:
        return {past(0): x_BTD}


class PastCloser(Closer):
    """One more mix of all outputs, with parameters of its own, goes to the final norm."""

    def __init__(self, aggregate: DepthAggregate) -> None:
        super().__init__()
        self.aggregate = aggregate
        self.reads = tuple(past(j) for j in range(aggregate.static.shape[1]))

    def forward(self, state: State) -> Tensor:
        return self.aggregate([state[name] for name in self.reads])[0]
