"""The reversible residual: two streams, each of which is changed by a function of the other.

Shape suffixes: B batch, T sequence, D model width.
"""

import dataclasses
from typing import Literal

import torch
from torch import Tensor, nn

from models.context import LayerContext
from models.residual.fixed_point import GridConfig, TwiceOnGrid, on_grid, stream_type
from models.slots import Closer, Connection, Opener
from models.state import Entry, State, Views


@dataclasses.dataclass(frozen=True)
class ReversibleResidual(GridConfig, kind="reversible"):
    """x1 <- x1 + Mixer(x2), x2 <- x2 + FFN(x1) (RevNet, arXiv 1707.04585; over full-width copies of the embedding as in
    RevViT, arXiv 2302.04869). The final norm reads (x1 + x2) / 2.

    What goes on the grid are the embedding and all branch outputs.
    """

    steps = (("mixer",), ("ffn",))

    def connect(self, ctx: LayerContext, branch: Literal["mixer", "ffn"], shortcut: nn.Module) -> Connection:
        source, target = ("x2", "x1") if branch == "mixer" else ("x1", "x2")
        return Reversible(ctx.d_model, source, target, self.grid_bits)

    def open(self, d_model: int) -> Opener:
        return TwiceOnGrid(d_model, self.grid_bits, ("x1", "x2"))

    def close(self, d_model: int, num_layers: int) -> Closer:
        return TwoStreamCloser()


class Reversible(Connection):
    """target <- target + F(source)."""

    reads = ("x1", "x2")

    def __init__(self, d_model: int, source: str, target: str, grid_bits: int | None) -> None:
        super().__init__()
        self.source, self.target, self.grid_bits = source, target, grid_bits
        self.writes = (Entry(target, (d_model,), dtype=stream_type(grid_bits)),)

    def read(self, state: State) -> tuple[Views, State]:
        return Views.same(state[self.source]), {}

    def rounded(self, out_BTD: Tensor) -> Tensor:
        return on_grid(out_BTD, self.grid_bits)

    def write(self, state: State, kept: State, out_BTD: Tensor) -> State:
        return {**state, self.target: state[self.target] + self.rounded(out_BTD)}

    def unwritten(self, after: State) -> State:
        return {self.source: after[self.source], self.target: torch.zeros_like(after[self.target])}

    def undo(self, after: State, redone: State) -> State:
        return {self.source: after[self.source], self.target: after[self.target] - redone[self.target]}

    def peek(self, state: State) -> Tensor:
        """What the model would end with here."""
        return (state["x1"] + state["x2"]) / 2

    def add(self, state: State, x_BTD: Tensor) -> State:
        x_BTD = self.rounded(x_BTD)
        return {**state, "x1": state["x1"] + x_BTD, "x2": state["x2"] + x_BTD}


class TwoStreamCloser(Closer):
    """The mean of the streams."""

    reads = ("x1", "x2")

    def forward(self, state: State) -> Tensor:
        return (state["x1"] + state["x2"]) / 2
