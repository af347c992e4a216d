"""How many bytes each layer's backward pass needs, and each state between layers: measured without data.

Shape suffixes: B batch, T sequence, D model width.
"""

import dataclasses
import itertools
from typing import Any

import torch
from torch import Tensor, nn

from models.config import LMConfig
from models.lm import LM
from models.noise import of_layer
from models.state import Side


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Bytes. layers: what autograd saves of each, but for the state that it is given. states: in front of each."""

    layers: tuple[int, ...]
    states: tuple[int, ...]

    def part(self, start: int, count: int) -> "Sizes":
        """Of a pipeline stage's layers."""
        return Sizes(self.layers[start : start + count], self.states[start : start + count])


class Saved:
    """Counts what autograd saves while it is entered: each storage once, and parameters not at all."""

    def __init__(self, module: nn.Module) -> None:
        self.found: dict[Any, tuple[int, Tensor]] = {}
        self._known = {storage(parameter) for parameter in module.parameters()}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda x: x)

    def _pack(self, x: Tensor) -> Tensor:
        if storage(x) not in self._known:
            # Kept alive, since the address of what is freed would be given out again.
            self.found[storage(x)] = (x.untyped_storage().nbytes(), x)
        return x

    def without(self, *tensors: Tensor) -> int:
        """Bytes of what was saved but for these."""
        others = {storage(x) for x in tensors}
        return sum(size for key, (size, _) in self.found.items() if key not in others)

    def __enter__(self) -> "Saved":
        self._hooks.__enter__()
        return self

    def __exit__(self, *args: Any) -> None:
        self._hooks.__exit__(*args)


def storage(x: Tensor) -> int:
    return x.untyped_storage()._cdata


def measure(config: LMConfig, batch: int, length: int) -> Sizes:
    """Of a batch [B, T] of one process, in bfloat16: what matters is how large layers are beside one another."""
    with torch.device("meta"), torch.enable_grad():
        model = LM(config).to(torch.bfloat16)
        index_BT = torch.arange(length).expand(batch, length)
        side = Side(index_BT, index_BT, keys=torch.zeros(batch, dtype=torch.int64))
        entries = {
            entry.name: torch.zeros(
                batch, length, *entry.shape, dtype=entry.dtype_in(torch.bfloat16), requires_grad=True
            )
            for entry in model.boundaries[0]
        }
        layers, states = [], []
        for layer in model.blocks:
            states.append(sum(x.nbytes for x in entries.values()))
            with Saved(layer) as saved:
                own = of_layer(side, layer.index)
                after, _ = layer(entries, own, own)
            layers.append(saved.without(*entries.values()))
            entries = after
    return Sizes(tuple(layers), tuple(states))


def stretches(sizes: Sizes) -> list[tuple[int, int]]:
    """(start, stop) of the stretches of layers for which the states in front of each and the largest of them, which is
    there while its gradients are taken, are least together."""
    count = len(sizes.layers)
    sums = [0, *itertools.accumulate(sizes.layers)]
    limits = {sums[stop] - sums[start] for start in range(count) for stop in range(start + 1, count + 1)}

    def cut(limit: int) -> list[tuple[int, int]]:
        """As long as the limit lets them be."""
        edges = [0]
        for stop in range(1, count + 1):
            if sums[stop] - sums[edges[-1]] > limit:
                edges.append(stop - 1)
        return list(itertools.pairwise([*edges, count]))

    def cost(parts: list[tuple[int, int]]) -> int:
        return sum(sizes.states[start] for start, _ in parts) + max(sums[stop] - sums[start] for start, stop in parts)

    fitting = (cut(limit) for limit in limits if limit >= max(sizes.layers))
    return min(fitting, key=lambda parts: (cost(parts), len(parts)))
