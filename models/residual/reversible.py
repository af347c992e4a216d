"""The reversible residual: two streams, each of which is changed by a function of the other.

Shape suffixes: B batch, T sequence, D model width.
"""

import dataclasses
import functools
from typing import Literal

import torch
from torch import Tensor, nn

from models.context import LayerContext
from models.kernels.grid_add import GridAdd
from models.kernels.grid_add.reference import on_grid
from models.norms.base import Placement
from models.residual.fixed_point import CopiesOnGrid, GridConfig, stream_type
from models.residual.following import Following
from models.slots import Closer, Connection, Opener
from models.state import Entry, Found, State, Views

STREAMS = ("x1", "x2")


@dataclasses.dataclass(frozen=True)
class ReversibleResidual(GridConfig, Following, kind="reversible"):
    """x1 <- x1 + Mixer(x2), x2 <- x2 + FFN(x1) (RevNet, arXiv 1707.04585; over full-width copies of the embedding as in
    RevViT, arXiv 2302.04869). The final norm reads (x1 + x2) / 2.

    What goes on the grid are the embedding and all branch outputs.
    """

    steps = (("mixer",), ("ffn",))
    # Distillation alone comes nearer (docs/convert.md).
    pays = False

    def connect(self, ctx: LayerContext, branch: Literal["mixer", "ffn"], shortcut: nn.Module) -> Connection:
        return Coupling(ctx.d_model, STREAMS, STREAMS[branch == "ffn"], self.grid_bits)

    def open(self, d_model: int) -> Opener:
        return CopiesOnGrid(d_model, self.grid_bits, STREAMS)

    def close(self, d_model: int, num_layers: int) -> Closer:
        return MeanCloser(STREAMS)

    def standing(self, x_BTD: Tensor, previous_BTD: Tensor) -> State:
        return {"x1": on_grid(previous_BTD, self.grid_bits), "x2": on_grid(x_BTD, self.grid_bits)}

    def reached(self, after: State) -> tuple[Tensor, ...]:
        return after["x1"], after["x2"]

    def aims(self, targets: tuple[Tensor, ...], last: bool) -> tuple[Tensor, ...]:
        middle_BTD, end_BTD = targets
        return middle_BTD, 2 * end_BTD - middle_BTD if last else end_BTD


class Coupling(Connection):
    """target <- target + F(max over the other streams), the maximum of each element."""

    def __init__(self, d_model: int, streams: tuple[str, ...], target: str, grid_bits: int | None) -> None:
        super().__init__()
        self.target, self.grid_bits, self.step = target, grid_bits, GridAdd()
        self.reads = self.stream = streams
        self.writes = (Entry(target, (d_model,), dtype=stream_type(grid_bits)),)

    def read(self, state: State) -> tuple[Views, State]:
        others = (state[name] for name in self.reads if name != self.target)
        return Views.same(functools.reduce(torch.maximum, others)), {}

    def find(self, state: State, placement: Placement) -> Found:
        views, kept = self.read(state)
        norm = placement.norm_before()
        if norm is None:
            return Found(placement.before(views), kept)
        # By the operation, so that a step that runs again has the bits that `hand_on` gave it.
        return Found(Views.same(self.step(views.q_BTD, (), 1, None, norm)[1]), kept)

    def write(self, state: State, kept: State, out_BTD: Tensor) -> State:
        return {**state, self.target: self.step(state[self.target], (out_BTD,), 1, self.grid_bits, None)[0]}

    def hand_on(
        self, state: State, kept: State, out_BTD: Tensor, following: Connection, placement: Placement
    ) -> tuple[State, Found]:
        norm = placement.norm_before()
        if norm is None or len(self.reads) > 2:
            return super().hand_on(state, kept, out_BTD, following, placement)
        # Of two streams the next branch reads the one that this one writes.
        x_BTD, normed_BTD = self.step(state[self.target], (out_BTD,), 1, self.grid_bits, norm)
        return {**state, self.target: x_BTD}, Found(Views.same(normed_BTD), {})

    def unwritten(self, after: State) -> State:
        return {**after, self.target: torch.zeros_like(after[self.target])}

    def undo(self, after: State, redone: State) -> State:
        return {**after, self.target: after[self.target] - redone[self.target]}

    def peek(self, state: State) -> Tensor:
        """What the model would end with here."""
        return mean(state, self.reads)

    def add(self, state: State, x_BTD: Tensor) -> State:
        x_BTD = on_grid(x_BTD, self.grid_bits)
        return {**state, **{name: state[name] + x_BTD for name in self.reads}}


class MeanCloser(Closer):
    """The mean of the streams."""

    def __init__(self, streams: tuple[str, ...]) -> None:
        super().__init__()
        self.reads = streams

    def forward(self, state: State) -> Tensor:
        return mean(state, self.reads)


def mean(state: State, streams: tuple[str, ...]) -> Tensor:
    return functools.reduce(torch.add, (state[name] for name in streams)) / len(streams)
