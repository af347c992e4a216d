"""How a sublayer is tied to the state: what a residual topology builds for each.

Shape suffixes: B batch, T sequence, D model width.
"""

from collections.abc import Callable

from torch import Tensor, nn

from models.norms.base import Placement
from models.state import Entry, Found, State, Views


class Connection(nn.Module):
    """One sublayer's tie to the state. `reads` and `writes` name the entries it owns; it passes on all others.

    stream: the entries, of those it reads, that `add` changes. num_views: 3 when query, key and value inputs differ.
    land: what a branch's output goes through before it is used; under a residual that `lands` it may still be under way
    when `write` gets it. by_rank: so many tensor ranks each run their part of the branch on an input of its own; views
    and outputs are [B, T, R, D] for the R that are here, over the group's tokens.
    """

    reads: tuple[str, ...] = ("x",)
    writes: tuple[Entry, ...] = ()
    stream: tuple[str, ...] = ("x",)
    num_views: int = 1
    by_rank: int | None = None
    land: Callable[[Tensor], Tensor] = staticmethod(lambda out_BTD: out_BTD)

    def read(self, state: State) -> tuple[Views, State]:
        """Returns (branch inputs, what `write` needs again)."""
        raise NotImplementedError

    def write(self, state: State, kept: State, out_BTD: Tensor) -> State:
        """The state with the branch's output joined in; never modifies a tensor in place."""
        raise NotImplementedError

    def find(self, state: State, placement: Placement) -> Found:
        """`read`, and the norm in front of the branch."""
        views, kept = self.read(state)
        return Found(placement.before(views), kept)

    def hand_on(
        self, state: State, kept: State, out_BTD: Tensor, following: "Connection", placement: Placement
    ) -> tuple[State, Found]:
        """`write`, and what the layer's next sublayer then has of `find`, for kinds that can do both in one pass. Where
        steps are undone it is that bit for bit: they run one by one the second time."""
        state = self.write(state, kept, out_BTD)
        return state, following.find(state, placement)

    def unwritten(self, after: State) -> State:
        """Of a residual whose steps can be undone: its entries in front of the step that this connection ends, as far
        as those behind it tell, with zeros for what the step only adds to."""
        raise NotImplementedError

    def undo(self, after: State, redone: State) -> State:
        """Its entries in front of the step. redone: what the step makes of `unwritten(after)`."""
        raise NotImplementedError

    def peek(self, state: State) -> Tensor:
        """One [B, T, D] view of the stream, for gates."""
        return state["x"]

    def add(self, state: State, x_BTD: Tensor) -> State:
        """The state with x added to the whole stream, `stream`, and so to what `peek` shows."""
        return {**state, "x": state["x"] + x_BTD}

    def flops_per_token(self, d_model: int) -> float:
        """Forward FLOPs beside those of its matrices, which are counted once per token: of weighted sums over streams
        or earlier outputs, 2 for each element of each summand, and of using a matrix again, for every stream. Norms,
        activations, scalings and plain additions count as nothing."""
        return 0.0
