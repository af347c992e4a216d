"""The parallel residual: a layer's two branches read the same input, and both outputs join it.

Shape suffixes: B batch, T sequence, D model width.
"""

import dataclasses
from typing import Literal

from torch import Tensor, nn

from models.context import LayerContext
from models.residual.plain import Plain
from models.slots import Connection, ResidualConfig
from models.state import Entry, State


@dataclasses.dataclass(frozen=True)
class ParallelResidualTwoNorms(ResidualConfig, kind="parallel_two_norms"):
    """x <- x + Mixer(N1 x) + FFN(N2 x), as in GPT-NeoX and Pythia (arXiv 2204.06745): each branch has its own norm."""

    def connect(self, ctx: LayerContext, branch: Literal["mixer", "ffn"], shortcut: nn.Module) -> Connection:
        return ParallelMixer(ctx.d_model, shortcut) if branch == "mixer" else ParallelFFN(ctx.d_model, shortcut)


@dataclasses.dataclass(frozen=True)
class ParallelResidual(ParallelResidualTwoNorms, kind="parallel"):
    """x <- x + Mixer(N x) + FFN(N x), as in GPT-J and PaLM (arXiv 2204.02311): one norm for both branches."""

    one_norm = True


class ParallelMixer(Plain):
    """Leaves x to the FFN as it is, and its own output beside it."""

    def __init__(self, d_model: int, shortcut: nn.Module) -> None:
        super().__init__(d_model, shortcut)
        self.writes = (Entry("mixed", (d_model,)),)

    def write(self, state: State, kept: State, out_BTD: Tensor) -> State:
        return {**state, "mixed": self.shortcut(state["x"]) + out_BTD}


class ParallelFFN(Plain):
    """Adds its output to what the mixer left: each of the two passes its own shortcut once."""

    reads = ("x", "mixed")

    def write(self, state: State, kept: State, out_BTD: Tensor) -> State:
        others = {name: entry for name, entry in state.items() if name != "mixed"}
        return {**others, "x": self.shortcut(state["mixed"]) + out_BTD}
