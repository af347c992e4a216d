"""What of a run is saved beside its weights: where it stands, and what an optimiser keeps."""

import dataclasses
from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from parallel.gradients import Held


@dataclasses.dataclass(frozen=True)
class RunState:
    """Where a run stands: optimiser steps done, samples and targets seen."""

    step: int = 0
    samples: int = 0
    tokens: int = 0

    def after(self, samples: int, tokens: int) -> "RunState":
        """The state after one more step."""
        return RunState(self.step + 1, self.samples + samples, self.tokens + tokens)


class OptimizerState(Protocol):
    """All that a checkpoint asks of an optimiser, whichever it is and whatever the mesh."""

    def state(self, held: Held) -> Mapping[str, Tensor]:
        """What is kept for one parameter, by a name such as "exp_avg"; it is saved as "parameter's name/exp_avg".

        Each tensor is plain and has the shape of what this rank holds of `held.parameter`, on any device, or is of
        shape [] and equal on all ranks, such as a count of updates. They are the optimiser's own, not copies: a
        checkpoint is loaded by writing into them. Before the first update they are made, with their first values, so
        that there is something to write into.
        """
        ...


class Updater(OptimizerState, Protocol):
    """What the loop asks of an optimiser."""

    def begin(self, lr: float) -> None:
        """Called before the gradients of each step. lr: that of its update."""
        ...

    def step(self, lr: float) -> None:
        """Update every parameter from its gradient (a collective). lr: of a parameter whose group does not scale it."""
        ...

    def report(self) -> dict[str, float]:
        """What is to be logged of the last update beside its loss, by name (a collective)."""
        ...
