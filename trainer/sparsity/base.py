"""What every kind of sparse training is: something around an optimiser's updates that decides which weights are seen.

The optimiser updates the dense weights, whichever it is; between updates parameters hold what the passes are to see.
"""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import Tensor

from models.config import LMConfig
from models.plugin import Plugin
from parallel.gradients import Held

if TYPE_CHECKING:
    from trainer.optim.base import Optimizer


class Sparsity:
    """Around the updates of an optimiser. As it is, all weights are seen."""

    def first_state(self, held: Held) -> dict[str, Tensor]:
        """What is kept for a parameter beside the optimiser's own state, in the same way."""
        return {}

    def begin(self) -> None:
        """Before the gradients of each step (a collective)."""

    @contextlib.contextmanager
    def updating(self, parameters: list[Held]) -> Iterator[None]:
        """Around an update of parameters (a collective of the pipeline stage)."""
        yield

    def report(self) -> dict[str, float]:
        """What of the last update is to be logged (a collective)."""
        return {}


class SparsityConfig(Plugin, slot="sparsity", folder="trainer.sparsity"):
    """Which weights are seen."""

    def patterns(self) -> list[tuple[str, str]]:
        """(key, value) of everything that must mean a parameter of the model."""
        return []

    def refuse(self, model: LMConfig) -> None:
        """Raise ValueError for a model whose weights cannot be treated so."""

    def build(self, optimizer: "Optimizer") -> Sparsity:
        raise NotImplementedError
