"""Dense training."""

import dataclasses
from typing import TYPE_CHECKING

from trainer.sparsity.base import Sparsity, SparsityConfig

if TYPE_CHECKING:
    from trainer.optim.base import Optimizer


@dataclasses.dataclass(frozen=True)
class NoSparsity(SparsityConfig, kind="none"):
    """All weights are seen."""

    def build(self, optimizer: "Optimizer") -> Sparsity:
        return Sparsity()
