"""Where parallelism takes hold of a branch: at its entry and exit, and around a mixer's core.

Shape suffixes: B batch, T sequence, R ranks, D model width.
"""

from collections.abc import Callable
from typing import ClassVar

from torch import Tensor

from models.slots import Cache
from models.state import Side, State, Views

Core = Callable[[dict[str, Tensor], dict[str, Tensor], Side, Cache | None], tuple[Tensor, Cache | None]]


class Boundary:
    """What happens to tensors that enter and leave a branch. This one: nothing; `parallel/` has others."""

    def enter(self, views: Views, inputs: State, by_head: State) -> tuple[Views, State]:
        return views, {**inputs, **by_head}

    def exit(self, out_BTD: Tensor) -> Tensor:
        return out_BTD

    def side(self, side: Side) -> Side:
        return side

    def gate(self, gate_BT: Tensor, out: Tensor) -> Tensor:
        """For [B, T, D] or [B, T, R, D]."""
        return gate_BT.view(*gate_BT.shape, *([1] * (out.dim() - 2))).to(out.dtype)


class Ends:
    """What happens to the state behind the last layer that is present. This one: nothing; `parallel/` has others."""

    def close(self, state: State, side: Side) -> tuple[State, Side]:
        """In front of the head. side: of the tokens that this rank has."""
        return state, side

    def leave(self, state: State) -> State:
        """In front of another stage."""
        return state


class LocalCore:
    """Runs a mixer's core where it is; the context-parallel one exchanges heads for tokens around it.

    splits: ranks hold different parts of the sequence.
    """

    splits: ClassVar[bool] = False

    def __call__(
        self, core: Core, heads: dict[str, Tensor], weights: dict[str, Tensor], side: Side, cache: Cache | None
    ) -> tuple[Tensor, Cache | None]:
        return core(heads, weights, side, cache)
