"""A layer is run again, but for its costliest operations, whose results are kept (arXiv 2205.05198).

torch's own selective checkpointing wants every operation to come again, which those of FSDP units inside of a layer do
not, and gives results to one backward pass alone, where schedules that split it need two (measured, torch 2.13).
"""

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

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
        self.operators = frozenset(getattr(packet, overload) for packet in packets for overload in packet.overloads())

    def run(self, layer: "Layer", state: State, side: Side, local: Side) -> "tuple[State, Extras]":
        def contexts() -> tuple[TorchDispatchMode, TorchDispatchMode]:
            made: list[Any] = []
            return Keeping(self.operators, made), Giving(self.operators, made)

        return checkpoint(
            layer.run, state, side, local, use_reentrant=False, preserve_rng_state=False, context_fn=contexts
        )


class Keeping(TorchDispatchMode):
    """Adds the operators' results to `made`, in order."""

    def __init__(self, operators: frozenset[Any], made: list[Any]) -> None:
        super().__init__()
        self.operators, self.made = operators, made

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in self.operators:
            self.made.append(detached(out))
        return out


class Giving(TorchDispatchMode):
    """Takes the operators' results from `made`, from the first on each time it is entered."""

    def __init__(self, operators: frozenset[Any], made: list[Any]) -> None:
        super().__init__()
        self.operators, self.made = operators, made

    def __enter__(self) -> "Giving":
        self._left = iter(self.made)
        return super().__enter__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.operators:
            return detached(next(self._left))
        return func(*args, **(kwargs or {}))


def detached(out: Any) -> Any:
    """Without the graph, which autograd adds to what an operator returned, and which would hold itself."""
    return tree_map_only(Tensor, torch.Tensor.detach, out)
