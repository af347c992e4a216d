"""Running branches as the tensor ranks would that a model is defined for, each on an input of its own.

Shape suffixes: B batch, T sequence, R ranks that are here, D model width, H heads.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from models.params import Axis, Parts, named_specs
from models.pieces import TENSOR_AXES, as_rank, fits
from models.slots import FFN, Beside, Cache, Mixer
from models.state import Entry, Layout, State, Views


class ByRank:
    """The ranks of a branch that are here: `count` of `ranks`, where `held` processes share them."""

    def __init__(self, branch: nn.Module, ranks: int) -> None:
        self.branch, self.ranks, self.held = branch, ranks, 1

    @property
    def count(self) -> int:
        return self.ranks // self.held

    def each(self) -> Iterator[int]:
        """The ranks' numbers; while one is at hand, the branch has that rank's parameters."""
        for index in range(self.count):
            with as_rank(self.branch, index, self.count, self.held):
                yield index

    def views(self, views: Views, index: int) -> Views:
        return views.map(lambda view_BTRD: view_BTRD[..., index, :])

    def inputs(self, inputs: State, index: int) -> State:
        """Of entries over heads, those of the rank's heads: nothing writes entries over tokens there."""
        return {name: x_BTH.chunk(self.count, 2)[index] for name, x_BTH in inputs.items()}

    def cache(self, cache: Cache | None, index: int) -> Cache | None:
        """What the rank's values keep for decoding."""
        prefix = f"{index}."
        return cache and {name.removeprefix(prefix): x for name, x in cache.items() if name.startswith(prefix)}

    def caches(self, made: list[Mapping[str, Tensor]]) -> Cache:
        return {f"{index}.{name}": x for index, own in enumerate(made) for name, x in own.items()}

    def together(self, made: Sequence[Mapping[str, Tensor]], dim: int) -> dict[str, Tensor]:
        return {name: torch.cat([own[name] for own in made], dim) for name in made[0]}


def check_by_rank(part: Mixer | FFN, branch: nn.Module, beside: Beside, ranks: int) -> None:
    """Raise ValueError for a branch that has no part for each of so many ranks."""
    name, who = type(part).__name__, f"a residual that gives each of {ranks} tensor ranks a stream of its own"
    if isinstance(part, FFN) and part.entry == "tokens":
        raise ValueError(f"{name} works on whole tokens, and {who} has none; use ffn swiglu")
    if isinstance(part, Mixer) and type(part).own_tokens is not Mixer.own_tokens:
        raise ValueError(f"{name} looks at whole tokens before its heads, and {who} has none; use mixer attention")
    if isinstance(part, Mixer) and type(part).finish is not Mixer.finish:
        raise ValueError(f"{name} needs a number from all heads, and {who} never adds them up; use mixer attention")
    if type(beside) is not Beside:
        raise ValueError(f"{type(beside).__name__} joins one identity path, and {who} has many; use shortcut none")
    axes = [axis for _, _, _, spec in named_specs(branch) for dim in spec.axes for axis in parts_of(dim)]
    if uneven := [axis for axis in axes if axis.name in TENSOR_AXES and not fits(axis, ranks)]:
        raise ValueError(
            f"{who} needs that number to divide the {uneven[0].groups} {uneven[0].name} of {name}; change one of them"
        )
    if not {axis.name for axis in axes} & set(TENSOR_AXES):
        raise ValueError(f"{name} names no axis that can be split over tensor ranks, which {who} needs")
    writes = cast(tuple[Entry, ...], branch.writes)
    if few := [entry for entry in writes if entry.layout is Layout.HEADS and (entry.heads or 0) % ranks]:
        raise ValueError(
            f"{few[0].name} of a layer has {few[0].heads} heads, and {who} makes values of its own for every rank; "
            f"give the mixer a multiple of {ranks} value heads, or use values own"
        )


def parts_of(dim: Axis | Parts | None) -> list[Axis]:
    return [axis for axis in (dim.axes if isinstance(dim, Parts) else (dim,)) if axis is not None]
