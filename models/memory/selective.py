"""A layer is run again, but for its costliest operations, whose results are kept (Korthikanti et al., arXiv
2205.05198, in the form of torch's selective checkpointing)."""

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from models.config import LMConfig
from models.keeper import Keeper
from models.memory.base import MemoryConfig
from models.state import Side, State

if TYPE_CHECKING:
    from models.layer import Extras, Layer


@dataclasses.dataclass(frozen=True)
class SelectiveConfig(MemoryConfig, kind="selective"):
    """Kept are the results of what a layer's mixer and FFN name in `costly`; all else is computed again."""

    @property
    def uncompiled(self) -> str:
        return "whose operators have no names left by which results could be kept"

    def keepers(self, layers: "list[Layer]", config: LMConfig) -> list[Keeper]:
        return [Selective(layer) for layer in layers]


class Selective(Keeper):
    def __init__(self, layer: "Layer") -> None:
        names = {*layer.mixer.branch.mixer.costly, *layer.ffn.branch.ffn.costly}
        packets = [getattr(torch.ops.aten, name) for name in names if hasattr(torch.ops.aten, name)]
        self.operators = {getattr(packet, overload) for packet in packets for overload in packet.overloads()}

    def policy(self, ctx: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if operator in self.operators else CheckpointPolicy.PREFER_RECOMPUTE

    def run(self, layer: "Layer", state: State, side: Side, local: Side) -> "tuple[State, Extras]":
        contexts = functools.partial(create_selective_checkpoint_contexts, self.policy)
        return checkpoint(
            layer.run, state, side, local, use_reentrant=False, preserve_rng_state=False, context_fn=contexts
        )
