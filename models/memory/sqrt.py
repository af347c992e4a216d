"""Stretches of layers are run again in the backward pass, so long that little is kept (arXiv 1604.06174)."""

import dataclasses
import functools
from typing import TYPE_CHECKING

import torch
from torch.utils.checkpoint import checkpoint

from models.config import LMConfig
from models.keeper import Keeper
from models.lm import LM, run_layers
from models.memory.base import MemoryConfig
from models.memory.sizes import measure, stretches
from models.slots import Cache
from models.state import Side, State

if TYPE_CHECKING:
    from models.layer import Extras, Layer


@dataclasses.dataclass(frozen=True)
class SqrtConfig(MemoryConfig, kind="sqrt"):
    """The states between stretches of layers are kept, and what one stretch needs while its gradients are taken: with
    equal layers about sqrt(L) stretches, and memory that grows by the root of depth, for one more forward pass.
    Stretches follow from the layers' sizes, which are measured without data at the batch's shape."""

    by_layer = False

    def keepers(self, layers: "list[Layer]", config: LMConfig) -> list[Keeper]:
        return [Keeper() for _ in layers]

    def apply(self, model: LM) -> None:
        super().apply(model)
        model.run_layers = Stretches(model.config)


class Stretches:
    """Stands in for `run_layers`."""

    def __init__(self, config: LMConfig) -> None:
        self.config = config
        self.cuts = functools.cache(self._cuts)

    def _cuts(self, batch: int, length: int, first: int, count: int) -> list[tuple[int, int]]:
        """For layers first..first+count-1 and a batch of this shape."""
        return stretches(measure(self.config, batch, length).part(first, count))

    def __call__(
        self, layers: "list[Layer]", entries: State, side: Side, local: Side, cache: dict[str, Cache] | None
    ) -> "tuple[State, list[Extras]]":
        if cache is not None or not torch.is_grad_enabled():
            return run_layers(layers, entries, side, local, cache)
        made = []
        for start, stop in self.cuts(*side.tokens.shape, layers[0].index, len(layers)):
            part = layers[start:stop]
            entries, own = checkpoint(
                run_layers, part, entries, side, local, None, use_reentrant=False, preserve_rng_state=False
            )
            made += own
        return entries, made
