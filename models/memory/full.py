"""A layer's input is kept, and the layer is run again in the backward pass (Chen et al., arXiv 1604.06174)."""

import dataclasses
from typing import TYPE_CHECKING

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from models.config import LMConfig
from models.keeper import Keeper
from models.memory.base import MemoryConfig
from models.state import Side, State

if TYPE_CHECKING:
    from models.layer import Extras, Layer


@dataclasses.dataclass(frozen=True)
class FullConfig(MemoryConfig, kind="full"):
    """Activation checkpointing of every layer, for one more forward pass: memory grows with depth by the state only."""

    saves = True

    def keepers(self, layers: "list[Layer]", config: LMConfig) -> list[Keeper]:
        return [Recomputed() for _ in layers]


class Recomputed(Keeper):
    def run(self, layer: "Layer", state: State, side: Side, local: Side) -> "tuple[State, Extras]":
        names = tuple(state)

        def run(*tensors: Tensor) -> "tuple[State, Extras]":
            return layer.run(dict(zip(names, tensors, strict=True)), side, local)

        # One by one, since torch saves as autograd does only tensors that are arguments. Draws are functions of the
        # batch's keys, so that torch's generators need not be put back.
        return checkpoint(run, *state.values(), use_reentrant=False, preserve_rng_state=False)
