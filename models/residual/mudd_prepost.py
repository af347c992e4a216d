"""MUDD connections over normed outputs, added to the newest one: the form for narrow, deep models.

Shape suffixes: B batch, T sequence, D model width.
"""

import dataclasses
from typing import Literal

from torch import Tensor, nn

from models.context import LayerContext
from models.params import Constant, RMSNorm
from models.residual.mudd import DepthAggregate, MUDDConnections
from models.residual.past import Selection, past
from models.slots import Closer, Connection, Opener
from models.state import Entry, State, Views


@dataclasses.dataclass(frozen=True)
class PrePostMUDD(MUDDConnections, kind="mudd_prepost"):
    """MUDD with PrePostDANorm (arXiv 2502.12170, equation 10, as the released training code has it): every output has a
    norm for all who mix it, each mix is added to the newest output itself, and the residual way and the model's end are
    normed before that. Starts as the plain residual.

    eps: of all norms.
    """

    def normed_aggregate(self, d_model: int, ways: int, sources: int) -> "NormedAggregate":
        return NormedAggregate(d_model, ways, sources, self.hidden(ways, sources), self.eps)

    def connect(self, ctx: LayerContext, branch: Literal["mixer", "ffn"], shortcut: nn.Module) -> Connection:
        return NormedEnd(self, ctx) if branch == "ffn" else NormedStart(self, ctx)

    def open(self, d_model: int) -> Opener:
        return Opener(d_model)

    def close(self, d_model: int, num_layers: int) -> Closer:
        selection = self.selection()
        if not selection.mixes(num_layers):
            return Closer()
        sources = selection.sources(num_layers)
        return NormedCloser(self.normed_aggregate(d_model, 1, len(sources)), sources)


class NormedAggregate(DepthAggregate):
    """out_c = X_newest + sum_j w[c, j] norm_j(X_j), the last of them with a norm around the sum; w is as in mudd, from
    a norm with weight, and starts at 0."""

    def __init__(self, d_model: int, ways: int, sources: int, hidden: int, eps: float) -> None:
        super().__init__(d_model, ways, sources, hidden, eps, Constant(0.0))
        self.norm = RMSNorm(d_model, eps)
        self.post_norm = RMSNorm(d_model, eps, init=1e-3)

    def normed(self, newest_BTD: Tensor) -> Tensor:
        return self.norm(newest_BTD)

    def forward(self, newest_BTD: Tensor, normed: list[Tensor]) -> list[Tensor]:  # type: ignore[override]
        """newest_BTD: the newest output. normed: all outputs behind their norms, oldest first. Returns C tensors."""
        *ways, last_BTD = self.mix(normed, self.weights(newest_BTD))
        return [newest_BTD + way_BTD for way_BTD in (*ways, self.post_norm(last_BTD))]


def source_norm(config: MUDDConnections, ctx: LayerContext, source: int) -> tuple[RMSNorm | None, tuple[Entry, ...]]:
    """The norm of an output and the entry behind it; nothing where no later mix looks at it."""
    if not config.selection().used(source, ctx.num_layers):
        return None, ()
    return RMSNorm(ctx.d_model, config.eps), (Entry(past(source), (ctx.d_model,)),)


class NormedStart(Connection):
    """A mixer's connection. The state holds the newest output as x, and outputs behind their norms as sources; the
    first layer makes the embedding's."""

    def __init__(self, config: PrePostMUDD, ctx: LayerContext) -> None:
        super().__init__()
        selection: Selection = config.selection()
        self.sources: tuple[str, ...] = ()
        self.aggregate, self.source_norm = None, None
        self.writes = (Entry("x", (ctx.d_model,)),)
        if selection.mixes(ctx.index):
            self.sources = tuple(past(j) for j in selection.sources(ctx.index))
            self.aggregate = config.normed_aggregate(ctx.d_model, 4, len(self.sources))
            self.num_views = 3 if config.separate_norms else 1
        if ctx.index == 0:
            self.source_norm, entries = source_norm(config, ctx, 0)
            self.writes += entries
        self.reads = ("x", *self.sources)

    def read(self, state: State) -> tuple[Views, State]:
        x_BTD = state["x"]
        if self.aggregate is None:
            return Views.same(x_BTD), {"residual": x_BTD}
        q_BTD, k_BTD, v_BTD, r_BTD = self.aggregate(x_BTD, [state[name] for name in self.sources])
        return Views(q_BTD, k_BTD, v_BTD), {"residual": r_BTD}

    def write(self, state: State, kept: State, out_BTD: Tensor) -> State:
        first = {} if self.source_norm is None else {past(0): self.source_norm(state["x"])}
        return {**state, **first, "x": kept["residual"] + out_BTD}

    def flops_per_token(self, d_model: int) -> float:
        return 0.0 if self.aggregate is None else self.aggregate.flops_per_token(d_model)


class NormedEnd(Connection):
    """An FFN's connection: plain, and its sum is one more source behind its norm."""

    def __init__(self, config: PrePostMUDD, ctx: LayerContext) -> None:
        super().__init__()
        self.output = past(ctx.index + 1)
        self.source_norm, entries = source_norm(config, ctx, ctx.index + 1)
        self.writes = (Entry("x", (ctx.d_model,)), *entries)

    def read(self, state: State) -> tuple[Views, State]:
        return Views.same(state["x"]), {}

    def write(self, state: State, kept: State, out_BTD: Tensor) -> State:
        x_BTD = state["x"] + out_BTD
        source = {} if self.source_norm is None else {self.output: self.source_norm(x_BTD)}
        return {**state, **source, "x": x_BTD}


class NormedCloser(Closer):
    """One more mix, with parameters of its own, goes to the final norm."""

    def __init__(self, aggregate: NormedAggregate, sources: list[int]) -> None:
        super().__init__()
        self.aggregate = aggregate
        self.sources = tuple(past(j) for j in sources)
        self.reads = ("x", *self.sources)

    def forward(self, state: State) -> Tensor:
        return self.aggregate(state["x"], [state[name] for name in self.sources])[0]

    def flops_per_token(self, d_model: int) -> float:
        return self.aggregate.flops_per_token(d_model)
