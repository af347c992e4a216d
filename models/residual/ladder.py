"""Ladder residual: a sublayer reads the stream without the output of the sublayer right before it.

Shape suffixes: B batch, T sequence, D model width.
"""

import dataclasses
from typing import Literal

from torch import Tensor, nn

from models.context import LayerContext
from models.slots import Connection, ResidualConfig
from models.state import Entry, State, Views


@dataclasses.dataclass(frozen=True)
class LadderResidual(ResidualConfig, kind="ladder"):
    """x_{k+1} = x_k + F_{k+1}(x_{k-1}) over sublayers, x_{-1} = x_0 (Zhang et al., arXiv 2501.06589), so
    that the reduction of a branch's output can run while the next branch computes.

    layers: those that do so (null: all); the sublayers of the others read the whole stream.
    """

    layers: tuple[int, ...] | None = None

    lands = True

    def __post_init__(self) -> None:
        if self.layers is not None and any(index < 0 for index in self.layers):
            raise ValueError(f"layers is {list(self.layers)}; they are counted from 0, so none may be negative")

    def connect(self, ctx: LayerContext, branch: Literal["mixer", "ffn"], shortcut: nn.Module) -> Connection:
        if self.layers is not None and max(self.layers, default=0) >= ctx.num_layers:
            raise ValueError(
                f"residual.layers names layer {max(self.layers)} and the last one is {ctx.num_layers - 1}; remove it"
            )
        ladder = [self.layers is None or index in self.layers for index in range(ctx.num_layers)]
        has_pending = ladder[ctx.index] and (ctx.index > 0 or branch == "ffn")
        following = ladder[ctx.index :][:1] if branch == "mixer" else ladder[ctx.index + 1 :][:1]
        return Ladder(ctx.d_model, shortcut, has_pending, leaves_pending=any(following))


class Ladder(Connection):
    """With the stream x and the output `pending` that is not yet part of it: x <- x + pending, pending <- F(x).

    has_pending: the sublayer before left its output. leaves_pending: the next sublayer reads without this output;
    otherwise it joins x at once, and the state is the plain residual's.
    """

    def __init__(self, d_model: int, shortcut: nn.Module, has_pending: bool, leaves_pending: bool) -> None:
        super().__init__()
        self.shortcut, self.has_pending, self.leaves_pending = shortcut, has_pending, leaves_pending
        x, pending = Entry("x", (d_model,)), Entry("pending", (d_model,))
        self.reads = ("x", "pending") if has_pending else ("x",)
        self.writes = (x, pending) if leaves_pending else (x,)

    def read(self, state: State) -> tuple[Views, State]:
        return Views.same(state["x"]), {}

    def write(self, state: State, kept: State, out_BTD: Tensor) -> State:
        x_BTD = self.shortcut(state["x"] + self.land(state["pending"]) if self.has_pending else state["x"])
        if self.leaves_pending:
            return {**state, "x": x_BTD, "pending": out_BTD}
        others = {name: entry for name, entry in state.items() if name != "pending"}
        return {**others, "x": x_BTD + self.land(out_BTD)}

    def peek(self, state: State) -> Tensor:
        """The stream that this sublayer reads: adding what is pending would make a gate wait for it."""
        return state["x"]
