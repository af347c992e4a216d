"""The plain residual: x <- x + F(x)."""

import dataclasses
from typing import Literal

from torch import Tensor, nn

from models.context import LayerContext
from models.slots import Connection, ResidualConfig
from models.state import Entry, State, Views


@dataclasses.dataclass(frozen=True)
class PlainResidual(ResidualConfig, kind="plain"):
    """One stream that every branch reads and adds to (He et al., arXiv 1603.05027)."""

    starts_plain = True

    def connect(self, ctx: LayerContext, branch: Literal["mixer", "ffn"], shortcut: nn.Module) -> Connection:
        return Plain(ctx.d_model, shortcut)


class Plain(Connection):
    def __init__(self, d_model: int, shortcut: nn.Module) -> None:
        super().__init__()
        self.shortcut = shortcut
        self.writes = (Entry("x", (d_model,)),)

    def read(self, state: State) -> tuple[Views, State]:
        return Views.same(state["x"]), {}

    def write(self, state: State, kept: State, out_BTD: Tensor) -> State:
        return {**state, "x": self.shortcut(state["x"]) + out_BTD}
