"""What all kinds of streams have that are read and written through small matrices.

Shape suffixes: B batch, T sequence, N streams, R rows (streams, or their fractions), Q rows read, D model width.
"""

import functools
from typing import ClassVar

import torch
from torch import Tensor

from models.ends import Closer, Opener
from models.kernels.handover import Handover
from models.kernels.handover.reading import Reading
from models.kernels.stream_mix import StreamMix
from models.norms.base import Placement
from models.slots import Connection
from models.state import Entry, Found, State, Views


class StreamOpener(Opener):
    """The embedding, once per stream."""

    def __init__(self, d_model: int, streams: int) -> None:
        super().__init__(d_model)
        self.streams = streams
        self.writes = (Entry("streams", (streams, d_model)),)

    def forward(self, x_BTD: Tensor) -> State:
        return {"streams": torch.stack([x_BTD] * self.streams, dim=-2)}


class StreamCloser(Closer):
    """The sum over the streams (section 2 of arXiv 2409.19606)."""

    reads = ("streams",)

    def forward(self, state: State) -> Tensor:
        return state["streams"].sum(-2)


def stream_sums(streams: int, d_model: int) -> float:
    """FLOPs per token of a branch's input from n streams (2 n D), of their mix (2 n^2 D) and of what the branch adds to
    each of them (2 n D)."""
    return 2 * streams * (streams + 2) * d_model


class Streams(Connection):
    """A branch reads a^T S, and the streams S [N, D] of a token become m^T S + b^T F(a^T S), where a, m and b are fixed
    or computed from S. `rows`, `parts`: what takes the place of streams, and of a branch's output.

    moves: m is what is moved between rows, which keep the rest; m + I stands in its place.
    """

    reads = stream = ("streams",)
    moves: ClassVar[bool] = False

    def __init__(self, streams: int, d_model: int) -> None:
        super().__init__()
        self.streams = streams
        self.writes = (Entry("streams", (streams, d_model)),)
        self.mix, self.handover = StreamMix(), Handover()

    def reading(self) -> Reading | None:
        """What a depends on, None where on nothing."""
        raise NotImplementedError

    def settle(self, logits: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """a [..., R, Q], m [..., R, R] and b [..., P, R], P rows of the branch's output."""
        raise NotImplementedError

    def rows(self, streams_BTND: Tensor) -> Tensor:
        return streams_BTND

    def parts(self, out_BTD: Tensor) -> Tensor:
        return out_BTD[..., None, :]

    def streams_of(self, rows_BTRD: Tensor) -> Tensor:
        return rows_BTRD

    def settled(self, dtype: torch.dtype, logits: Tensor | None) -> tuple[Tensor, State]:
        weights, mix, beta = self.settle(logits)
        return weights.to(dtype), {"mix": mix.to(dtype), "beta": beta.to(dtype)}

    def read(self, state: State) -> tuple[Views, State]:
        rows, reading = self.rows(state["streams"]), self.reading()
        weights, kept = self.settled(rows.dtype, None if reading is None else reading.logits(rows))
        return Views.same(self.mix(rows, weights).flatten(-2)), kept

    def write(self, state: State, kept: State, out_BTD: Tensor) -> State:
        # Mixed here, not in `read`, so that one set of streams and not two lives while the branch runs.
        rows = self.mix(self.rows(state["streams"]), kept["mix"], self.parts(out_BTD), kept["beta"], self.moves)
        return {**state, "streams": self.streams_of(rows)}

    def hand_on(
        self, state: State, kept: State, out_BTD: Tensor, following: Connection, placement: Placement
    ) -> tuple[State, Found]:
        assert isinstance(following, Streams), "a layer's sublayers are connected alike"
        rows, out = self.rows(state["streams"]), self.parts(out_BTD)
        settle = functools.partial(following.settled, rows.dtype)
        written, read, kept = self.handover(
            rows, kept["mix"], out, kept["beta"], self.moves, following.reading(), settle, self.mix
        )
        found = Found(placement.before(Views.same(read.flatten(-2))), kept)
        return {**state, "streams": self.streams_of(written)}, found

    def peek(self, state: State) -> Tensor:
        """The mean over the streams, which at initialisation is the plain residual's stream."""
        return state["streams"].mean(-2)

    def add(self, state: State, x_BTD: Tensor) -> State:
        return {**state, "streams": state["streams"] + x_BTD[..., None, :]}

    def flops_per_token(self, d_model: int) -> float:
        return stream_sums(self.streams, d_model)
