"""Layers' outputs that stay in the state for later layers to mix.

Source j is the output of layer j - 1, source 0 the embedding; layer i reads a mix or, without one, source i itself.
Shape suffixes: B batch, T sequence, D model width, C mixes, J sources.
"""

import dataclasses

import torch
from torch import Tensor, nn

from models.context import LayerContext
from models.limits import at_least
from models.slots import Connection, Opener
from models.state import Entry, State, Views


def past(index: int) -> str:
    """The entry with source `index`."""
    return f"past.{index}"


@dataclasses.dataclass(frozen=True)
class Newest:
    """[C, J] or [J]: every mix is the newest source alone, which is the plain residual."""

    def __call__(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return torch.eye(shape[-1])[-1].expand(shape).clone()


@dataclasses.dataclass(frozen=True)
class Selection:
    """Which sources are mixed in front of which layers.

    dilation: every how many outputs one is looked at, counted back from the newest. period: after every how many
    layers there is a mix. window: how many of the newest outputs are looked at beside the embedding (null: all).
    """

    dilation: int = 1
    period: int = 1
    window: int | None = None

    def __post_init__(self) -> None:
        at_least(self, 1, "dilation", "period")
        at_least(self, 1, "window", hint=", or null for all outputs")
        if self.window is not None and self.dilation > 1:
            raise ValueError(
                f"window is {self.window} and dilation is {self.dilation}; a window keeps the newest outputs and "
                "dilation leaves some of them out, so use one of them"
            )

    def mixes(self, index: int) -> bool:
        """Whether there is a mix in front of layer `index`, or of the final norm when that is the number of layers."""
        return index > 0 and index % self.period == 0

    def sources(self, index: int) -> list[int]:
        """What the mix in front of layer `index` looks at, oldest first."""
        if self.window is not None:
            return [0, *range(max(1, index - self.window + 1), index + 1)]
        return list(range(index % self.dilation, index + 1, self.dilation))

    def used(self, source: int, num_layers: int) -> bool:
        """Whether any mix looks at this source."""
        return any(self.mixes(index) and source in self.sources(index) for index in range(source, num_layers + 1))


class PastOpener(Opener):
    """The embedding is source 0."""

    def __init__(self, d_model: int) -> None:
        super().__init__(d_model)
        self.writes = (Entry(past(0), (d_model,)),)

    def forward(self, x_BTD: Tensor) -> State:
        return {past(0): x_BTD}


class LayerEnd(Connection):
    """An FFN's connection: plain within the layer, and its sum is one more source for the layers behind it."""

    reads = ("x",)

    def __init__(self, ctx: LayerContext, shortcut: nn.Module) -> None:
        super().__init__()
        self.shortcut, self.output = shortcut, past(ctx.index + 1)
        self.writes = (Entry(self.output, (ctx.d_model,)),)

    def read(self, state: State) -> tuple[Views, State]:
        return Views.same(state["x"]), {}

    def write(self, state: State, kept: State, out_BTD: Tensor) -> State:
        return {**state, self.output: self.shortcut(state["x"]) + out_BTD}
