"""Desync residual: every tensor rank keeps a stream of its own, and most sublayers add to it what that rank computed.

Shape suffixes: B batch, T sequence, D model width, R streams that are here.
"""

import dataclasses
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor, nn

from models.context import LayerContext
from models.limits import at_least
from models.slots import Closer, Connection, Opener, ResidualConfig
from models.state import Entry, Layout, State, Views
from models.tensor_group import TensorGroup


@dataclasses.dataclass(frozen=True)
class DesyncResidual(ResidualConfig, kind="desync"):
    """Desync residual (Zhang et al., arXiv 2501.06589): rank r adds its own part of a branch's sum, F_r(N x_r), to its
    stream x_r; only now and then x <- mean_r x_r + sum_r F_r(N x_r) is reduced, for all ranks.

    ranks: for how many tensor ranks the model is defined; any tp that divides it computes it. every: how many sublayers
    there are to a reduction; 2 reduces after each FFN, 4 after every second one. The last sublayer always does.
    """

    ranks: int
    every: int = 2

    example = MappingProxyType({"ranks": 4})
    takes_shortcut = False

    def __post_init__(self) -> None:
        at_least(self, 2, "ranks", hint=" for streams to differ")
        at_least(self, 1, "every")

    def connect(self, ctx: LayerContext, branch: Literal["mixer", "ffn"], shortcut: nn.Module) -> Connection:
        sublayer = 2 * ctx.index + (branch == "ffn") + 1
        return Desync(ctx.d_model, self.ranks, reduces=sublayer % self.every == 0 or sublayer == 2 * ctx.num_layers)

    def open(self, d_model: int) -> Opener:
        return DesyncOpener(d_model, self.ranks)

    def close(self, d_model: int, num_layers: int) -> Closer:
        return DesyncCloser()


def streams(d_model: int, ranks: int) -> Entry:
    """Laid out as heads are: over tensor ranks, each with the whole sequence."""
    return Entry("streams", (ranks, d_model), Layout.HEADS, heads=ranks)


class Desync(Connection):
    """Views and outputs are [B, T, R, D]: one for each of the ranks that are simulated here."""

    reads = stream = ("streams",)

    def __init__(self, d_model: int, ranks: int, reduces: bool) -> None:
        super().__init__()
        self.group, self.ranks, self.reduces = TensorGroup(), ranks, reduces
        self.by_rank = ranks
        self.writes = (streams(d_model, ranks),)

    def read(self, state: State) -> tuple[Views, State]:
        return Views.same(state["streams"]), {}

    def write(self, state: State, kept: State, out_BTD: Tensor) -> State:
        streams_BTRD, out_BTRD = state["streams"], out_BTD
        if not self.reduces:
            return {**state, "streams": streams_BTRD + out_BTRD}
        sum_BTD = self.group.sum((streams_BTRD / self.ranks + out_BTRD).sum(-2))
        return {**state, "streams": sum_BTD[:, :, None].expand_as(streams_BTRD).contiguous()}

    def peek(self, state: State) -> Tensor:
        """The mean over all ranks' streams."""
        return self.group.sum_own(state["streams"].sum(-2)) / self.ranks

    def add(self, state: State, x_BTD: Tensor) -> State:
        """To every rank's stream."""
        return {**state, "streams": state["streams"] + self.group.all_tokens(x_BTD)[:, :, None]}


class DesyncOpener(Opener):
    """The embedding, once per rank."""

    def __init__(self, d_model: int, ranks: int) -> None:
        super().__init__(d_model)
        self.group, self.ranks = TensorGroup(), ranks
        self.writes = (streams(d_model, ranks),)

    def forward(self, x_BTD: Tensor) -> State:
        return {"streams": torch.stack([self.group.all_tokens(x_BTD)] * (self.ranks // self.group.size), dim=-2)}


class DesyncCloser(Closer):
    """After the last reduction all streams are equal."""

    reads = ("streams",)

    def __init__(self) -> None:
        super().__init__()
        self.group = TensorGroup()

    def forward(self, state: State) -> Tensor:
        return self.group.own_tokens(state["streams"][:, :, 0])
