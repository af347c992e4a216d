"""MUDD connections: a layer's query, key, value and residual inputs are mixed, per token, from all earlier outputs.

Shape suffixes: B batch, T sequence, D model width, C ways, J sources (outputs so far, the embedding among them),
K hidden width of the generator.
"""

import dataclasses
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from models.context import LayerContext
from models.kernels.depth_mix import DepthMix
from models.limits import above_zero, at_least
from models.params import Constant, FanIn, Init, Linear, declare, upcast
from models.residual.past import LayerEnd, Newest, PastOpener, Selection, past
from models.slots import Closer, Connection, Opener, ResidualConfig
from models.state import Entry, State, Views


@dataclasses.dataclass(frozen=True)
class MUDDConnections(ResidualConfig, kind="mudd"):
    """Multiway dynamic dense connections (Xiao et al., arXiv 2502.12170, section 2). Starts as the plain residual.

    separate_norms: the query, key and value inputs have a norm each. hidden_round: r makes the generator's hidden
    width K into (K // r + 1) * r, as the released models do with 64. expand_last: factor on K at the model's end,
    4 in the released models. eps: of the generator's norm. dilation, period: mixes look at every dilation-th output,
    counted back from the newest, and stand after every period-th layer; 2 and 2 are the paper's 2x2. window: mixes look
    at the embedding and that many of the newest outputs, the paper's SW (null: at all).
    """

    separate_norms: bool = True
    hidden_round: int | None = None
    expand_last: int = 1
    eps: float = 1e-6
    dilation: int = 1
    period: int = 1
    window: int | None = None

    takes_shortcut = False
    starts_plain = True

    def __post_init__(self) -> None:
        at_least(self, 1, "hidden_round", hint=", or null for no rounding")
        at_least(self, 1, "expand_last")
        above_zero(self, "eps", hint=", and 1e-6 is usual")
        self.selection()

    def selection(self) -> Selection:
        """Raises ValueError for values that select nothing."""
        return Selection(self.dilation, self.period, self.window)

    def hidden(self, ways: int, sources: int) -> int:
        hidden = ways * sources * (self.expand_last if ways == 1 else 1)
        return hidden if self.hidden_round is None else (hidden // self.hidden_round + 1) * self.hidden_round

    def aggregate(self, d_model: int, ways: int, sources: int) -> "DepthAggregate":
        return DepthAggregate(d_model, ways, sources, self.hidden(ways, sources), self.eps)

    def connect(self, ctx: LayerContext, branch: Literal["mixer", "ffn"], shortcut: nn.Module) -> Connection:
        if branch == "ffn":
            return LayerEnd(ctx, shortcut)
        return MixedStart(self, ctx) if self.selection().mixes(ctx.index) else UnmixedStart(ctx)

    def open(self, d_model: int) -> Opener:
        return PastOpener(d_model)

    def close(self, d_model: int, num_layers: int) -> Closer:
        if not self.selection().mixes(num_layers):
            return NewestCloser(num_layers)
        sources = self.selection().sources(num_layers)
        return MixedCloser(self.aggregate(d_model, 1, len(sources)), sources)


class DepthAggregate(nn.Module):
    """w = GELU(norm(X_newest) W1) W2 + a, and out_c = sum_j w[c, j] X_j; the norm is an RMSNorm without weight."""

    static: nn.Parameter

    def __init__(
        self, d_model: int, ways: int, sources: int, hidden: int, eps: float, static_init: Init | None = None
    ) -> None:
        super().__init__()
        self.ways, self.sources, self.eps = ways, sources, eps
        self.down = Linear(d_model, hidden, init=FanIn(d_model), role="gate")
        self.up = Linear(hidden, ways * sources, init=Constant(0.0), role="gate", wide=False)
        declare(self, "static", (ways, sources), static_init or Newest(), decay=False)
        self.mix = DepthMix()

    def normed(self, newest_BTD: Tensor) -> Tensor:
        return F.rms_norm(newest_BTD, newest_BTD.shape[-1:], eps=self.eps)

    def weights(self, newest_BTD: Tensor) -> Tensor:
        """Returns [B, T, C, J], in at least float32."""
        hidden_BTK = F.gelu(self.down(self.normed(newest_BTD)))
        return upcast(self.up(hidden_BTK)).unflatten(-1, (self.ways, -1)) + self.static

    def forward(self, sources: list[Tensor]) -> list[Tensor]:
        """sources: J tensors [B, T, D], oldest first. Returns C of them."""
        return self.mix(sources, self.weights(sources[-1]))

    def flops_per_token(self, d_model: int) -> float:
        return 2 * self.ways * self.sources * d_model


class MixedStart(Connection):
    """A mixer's connection: four ways, for the queries, the keys, the values, and what the layer is added to."""

    def __init__(self, config: MUDDConnections, ctx: LayerContext) -> None:
        super().__init__()
        self.reads = tuple(past(j) for j in config.selection().sources(ctx.index))
        self.writes = (Entry("x", (ctx.d_model,)),)
        self.stream = self.reads[-1:]
        self.num_views = 3 if config.separate_norms else 1
        self.aggregate = config.aggregate(ctx.d_model, 4, len(self.reads))

    def read(self, state: State) -> tuple[Views, State]:
        q_BTD, k_BTD, v_BTD, r_BTD = self.aggregate([state[name] for name in self.reads])
        return Views(q_BTD, k_BTD, v_BTD), {"residual": r_BTD}

    def write(self, state: State, kept: State, out_BTD: Tensor) -> State:
        return {**state, "x": kept["residual"] + out_BTD}

    def flops_per_token(self, d_model: int) -> float:
        return self.aggregate.flops_per_token(d_model)

    def peek(self, state: State) -> Tensor:
        """The newest output."""
        return state[self.reads[-1]]

    def add(self, state: State, x_BTD: Tensor) -> State:
        return {**state, self.reads[-1]: state[self.reads[-1]] + x_BTD}


class UnmixedStart(Connection):
    """A mixer's connection where there is no mix, as in front of the first layer: it reads the newest output."""

    def __init__(self, ctx: LayerContext) -> None:
        super().__init__()
        self.newest = past(ctx.index)
        self.reads = self.stream = (self.newest,)
        self.writes = (Entry("x", (ctx.d_model,)),)

    def read(self, state: State) -> tuple[Views, State]:
        return Views.same(state[self.newest]), {}

    def write(self, state: State, kept: State, out_BTD: Tensor) -> State:
        return {**state, "x": state[self.newest] + out_BTD}

    def peek(self, state: State) -> Tensor:
        return state[self.newest]

    def add(self, state: State, x_BTD: Tensor) -> State:
        return {**state, self.newest: state[self.newest] + x_BTD}


class MixedCloser(Closer):
    """One more mix, with parameters of its own, goes to the final norm."""

    def __init__(self, aggregate: DepthAggregate, sources: list[int]) -> None:
        super().__init__()
        self.aggregate = aggregate
        self.reads = tuple(past(j) for j in sources)

    def forward(self, state: State) -> Tensor:
        return self.aggregate([state[name] for name in self.reads])[0]

    def flops_per_token(self, d_model: int) -> float:
        return self.aggregate.flops_per_token(d_model)


class NewestCloser(Closer):
    """The last layer's output, where the period leaves no mix behind it."""

    def __init__(self, num_layers: int) -> None:
        super().__init__()
        self.reads = (past(num_layers),)

    def forward(self, state: State) -> Tensor:
        return state[self.reads[0]]
