"""Layers are undone a layer ahead: rebuilding one overlaps the gradients of the one behind it (arXiv 2306.09342)."""

import dataclasses
import weakref

from torch import Tensor

from models.memory.lanes import Lanes, lanes_of
from models.memory.reversible import ReversibleConfig
from models.memory.undone import Again, Call, Chain, Gradients, Undone
from models.state import State


@dataclasses.dataclass(frozen=True)
class PaRepropConfig(ReversibleConfig, kind="pareprop"):
    """`reversible`, with two CUDA streams that take turns at layers: while one computes the gradients of a layer, the
    other runs the branches of the layer in front (PaReprop, Zhu and Mangalam, arXiv 2306.09342). Two layers' branches
    are kept at a time. On a CPU the same happens in turn, and nothing is gained.

    alarm: as of `reversible`.
    """

    @property
    def ahead(self) -> bool:
        return True

    def chain(self, steps: tuple[tuple[str, ...], ...], exact: bool) -> Chain:
        return ChainAhead(steps, exact)

    def keeper(self, chain: Chain, index: int, last: bool) -> Undone:
        return UndoneAhead(chain, index, last)


class ChainAhead(Chain):
    """Also knows the last call of a forward pass, and what was run again for a layer whose turn has not come."""

    def __init__(self, steps: tuple[tuple[str, ...], ...], exact: bool) -> None:
        super().__init__(steps, exact)
        self.latest: weakref.ref[Call] | None = None
        self.lanes: Lanes | None = None
        self._again: tuple[Call, list[Again], State] | None = None

    def run_again(self, call: Call, after: State, first: bool) -> None:
        """All steps of the call's layer, from the state behind it."""
        if self.lanes is None:
            self.lanes = lanes_of(next(iter(after.values())).device)
        steps: list[Again] = []
        with self.lanes.turn((*after.values(), *call.sides.values()), first):
            for step in reversed(self.steps):
                again, after = call.undo(step, after)
                steps.append(again)
        self._again = (call, steps, after)

    def taken(self, call: Call) -> tuple[list[Again], State]:
        """The steps that ran again, and the state in front of the layer."""
        assert self._again is not None and self._again[0] is call, "backward passes follow one another"
        (_, steps, before), self._again = self._again, None
        return steps, before


class UndoneAhead(Undone):
    chain: ChainAhead

    def called(self, call: Call) -> None:
        call.before = self.chain.latest if self.index else None
        self.chain.latest = weakref.ref(call)

    def backward(self, call: Call, gradients: tuple[Tensor | None, ...]) -> Gradients:
        if self.last:
            self.chain.run_again(call, call.behind, first=True)
        steps, before = self.chain.taken(call)
        self.measure(call, before)
        if call.before is not None and (earlier := call.before()) is not None:
            self.chain.run_again(earlier, before, first=False)
        found = Gradients(call, gradients)
        for again in steps:
            found.add(again)
        assert self.chain.lanes is not None
        made = (*found.of_entries.values(), *found.of_parameters)
        self.chain.lanes.hand_over(x for x in made if x is not None)
        return found
