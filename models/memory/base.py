"""The slot `memory`: what of the forward pass is kept for the backward pass, and what is computed again.

It changes no number: a model trains the same under every kind, and checkpoints do not know of it.
"""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from models.config import LMConfig
from models.keeper import Keeper
from models.lm import LM, run_layers
from models.plugin import Plugin

if TYPE_CHECKING:
    from models.layer import Layer


class MemoryConfig(Plugin, slot="memory", folder="models.memory"):
    """How much of a layer's forward pass is kept.

    by_layer: other layers may be kept otherwise. saves: what it keeps is what autograd saves. once: all of it is, where
    it was saved: nothing runs again.
    """

    by_layer: ClassVar[bool] = True
    saves: ClassVar[bool] = False
    once: ClassVar[bool] = False

    @property
    def splits_backward(self) -> bool:
        """Whether gradients of inputs may be taken before those of weights, in passes of their own."""
        return True

    @property
    def ahead(self) -> bool:
        """Whether layers run again before their own backward pass begins."""
        return False

    @property
    def uncompiled(self) -> str:
        """Why layers cannot be compiled, if they cannot."""
        return ""

    def refuse(self, model: LM) -> None:
        """Raise ValueError for a model whose activations it cannot do without. model: whole, perhaps without data."""

    def report(self, stats: Mapping[str, Tensor]) -> dict[str, float]:
        """What a step's statistics say of it, by name."""
        return {}

    def warning(self, report: Mapping[str, float], warned: Mapping[str, float], exact: bool) -> str | None:
        """A sentence for whom the step's report should worry. warned: the report of the last one. exact: the residual
        promises to be undone bit for bit."""
        return None

    def keepers(self, layers: "list[Layer]", config: LMConfig) -> Iterable[Keeper]:
        """One for each of a stage's layers, which are in order."""
        raise NotImplementedError

    def apply(self, model: LM) -> None:
        """Have the model's layers run so, in place of what was applied before."""
        model.run_layers = run_layers
        for layer, keeper in zip(model.blocks, self.keepers(model.blocks, model.config), strict=True):
            layer.keeper = keeper
