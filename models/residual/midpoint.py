"""The midpoint residual: layers as steps of a two-step recurrence, which can be walked back.

Shape suffixes: B batch, T sequence, D model width.
"""

import dataclasses
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor, nn

from models.context import LayerContext
from models.kernels.grid_add import GridAdd
from models.kernels.grid_add.reference import on_grid
from models.limits import above_zero
from models.norms.base import Placement
from models.residual.fixed_point import CopiesOnGrid, GridConfig, stream_type
from models.residual.following import Following
from models.slots import Closer, Connection, Opener
from models.state import Entry, Found, State, Views


@dataclasses.dataclass(frozen=True)
class TwoStepResidual(GridConfig):
    """p_{l+1} = p_{l-1} + c_l f_l(p_l), where f_l is what plain layer l adds: f(p) = m + FFN(p + m), m = Mixer(p).

    step: c_l is 2 step. What goes on the grid are the embedding and what is added.
    """

    step: float = 0.25

    steps = (("mixer", "ffn"),)

    def __post_init__(self) -> None:
        super().__post_init__()
        above_zero(self, "step", hint=", and 0.25 is usual")

    def connect(self, ctx: LayerContext, branch: Literal["mixer", "ffn"], shortcut: nn.Module) -> Connection:
        if branch == "mixer":
            return MidpointStart(ctx.d_model, self.grid_bits)
        return MidpointEnd(ctx.d_model, self.factor(ctx.index), self.grid_bits)

    def factor(self, index: int) -> float:
        """c_l of layer `index`."""
        return 2 * self.step

    def open(self, d_model: int) -> Opener:
        return CopiesOnGrid(d_model, self.grid_bits, ("x", "previous"))


@dataclasses.dataclass(frozen=True)
class MidpointResidual(TwoStepResidual, Following, kind="midpoint"):
    """p_{l+1} = p_{l-1} + 2 step f_l(p_l) (arXiv 2512.02056). The first step, with nothing before it, is
    p_1 = p_0 + step f_0(p_0). The final norm reads p_L.

    step, grid_bits: as of `TwoStepResidual`.
    """

    converted = MappingProxyType({"step": 1.0})

    def factor(self, index: int) -> float:
        return self.step if index == 0 else super().factor(index)

    def close(self, d_model: int, num_layers: int) -> Closer:
        return MidpointCloser()

    def standing(self, x_BTD: Tensor, previous_BTD: Tensor) -> State:
        return {"x": on_grid(x_BTD, self.grid_bits), "previous": on_grid(previous_BTD, self.grid_bits)}

    def reached(self, after: State) -> tuple[Tensor, ...]:
        return (after["x"],)


class MidpointStart(Connection):
    """A mixer's connection: its output waits as `delta`."""

    def __init__(self, d_model: int, grid_bits: int | None) -> None:
        super().__init__()
        self.grid_bits = grid_bits
        self.writes = (Entry("delta", (d_model,)),)

    def read(self, state: State) -> tuple[Views, State]:
        return Views.same(state["x"]), {}

    def write(self, state: State, kept: State, out_BTD: Tensor) -> State:
        return {**state, "delta": out_BTD}

    def add(self, state: State, x_BTD: Tensor) -> State:
        return {**state, "x": state["x"] + on_grid(x_BTD, self.grid_bits)}


class MidpointEnd(Connection):
    """An FFN's connection, which makes the step: x <- previous + factor (delta + F(x + delta)), previous <- x."""

    reads = ("x", "previous", "delta")

    def __init__(self, d_model: int, factor: float, grid_bits: int | None) -> None:
        super().__init__()
        self.factor, self.grid_bits, self.step = factor, grid_bits, GridAdd()
        self.writes = tuple(Entry(name, (d_model,), dtype=stream_type(grid_bits)) for name in ("x", "previous"))

    def read(self, state: State) -> tuple[Views, State]:
        return Views.same(state["x"] + state["delta"]), {}

    def find(self, state: State, placement: Placement) -> Found:
        norm = placement.norm_before()
        if norm is None:
            return super().find(state, placement)
        return Found(Views.same(self.step(state["x"], (state["delta"],), 1, None, norm)[1]), {})

    def write(self, state: State, kept: State, out_BTD: Tensor) -> State:
        others = {name: entry for name, entry in state.items() if name != "delta"}
        x_BTD, _ = self.step(state["previous"], (state["delta"], out_BTD), self.factor, self.grid_bits, None)
        return {**others, "x": x_BTD, "previous": state["x"]}

    def unwritten(self, after: State) -> State:
        return {"x": after["previous"], "previous": torch.zeros_like(after["x"])}

    def undo(self, after: State, redone: State) -> State:
        return {"x": after["previous"], "previous": after["x"] - redone["x"]}


class MidpointCloser(Closer):
    """p_L. That p_{L-1} is read too keeps the pair whole, from which all earlier ones follow."""

    reads = ("x", "previous")
