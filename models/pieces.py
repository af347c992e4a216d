"""Cutting parameters along their named axes: by tensor parallelism from outside, and by models that are defined for a
number of tensor ranks.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from models.params import Axis, ParamSpec, Parts, named_specs

TENSOR_AXES = ("heads", "kv_heads", "ffn", "vocab")


def split(axis: Axis, size: int, index: int, count: int) -> tuple[int, int, int]:
    """(start, length, number of distinct pieces) of piece `index` of `count` of a dimension of `size`.

    Raises ValueError when the groups cannot be dealt out evenly.
    """
    groups = axis.groups
    if groups % count == 0:
        return index * (size // count), size // count, count
    if axis.name == "kv_heads" and count % groups == 0:
        return index // (count // groups) * (size // groups), size // groups, groups
    raise ValueError(f"{groups} {axis.name} cannot be split over {count} ranks")


def fits(axis: Axis, degree: int) -> bool:
    return axis.groups % degree == 0 or (axis.name == "kv_heads" and degree % axis.groups == 0)


def cut(whole: Tensor, spec: ParamSpec, index: int, count: int, held: int = 1) -> Tensor:
    """Piece `index` of `count` of a parameter, or of the piece of it that one of `held` tensor ranks holds."""
    for dim, axes in enumerate(spec.axes):
        parts = axes if isinstance(axes, Parts) else Parts((spec.shape[dim],), (axes,))
        if not any(axis is not None and axis.name in TENSOR_AXES for axis in parts.axes):
            continue
        pieces, start = [], 0
        for size, axis in zip(parts.sizes, parts.axes, strict=True):
            first, length = 0, size
            if axis is not None and axis.name in TENSOR_AXES:
                size = split(axis, size, 0, held)[1]
                here = Axis(axis.name, max(1, axis.groups // held))
                first, length, _ = split(here, size, index, count)
            pieces.append(whole.narrow(dim, start + first, length))
            start += size
        whole = torch.cat(pieces, dim) if len(pieces) > 1 else pieces[0]
    return whole


@contextlib.contextmanager
def as_rank(module: nn.Module, index: int, count: int, held: int) -> Iterator[None]:
    """Within it, `module` has the parameters of rank `index` of `count`; see `cut`.

    A piece is an attribute of the instance, found before the parameter of the same name, as the copies of
    `parallel.precision` are.
    """
    before: list[tuple[nn.Module, str, Tensor | None]] = []
    try:
        for _, owner, name, spec in named_specs(module):
            piece = cut(getattr(owner, name), spec, index, count, held)
            before.append((owner, name, owner.__dict__.get(name)))
            owner.__dict__[name] = piece
        yield
    finally:
        for owner, name, old in before:
            if old is None:
                del owner.__dict__[name]
            else:
                owner.__dict__[name] = old
