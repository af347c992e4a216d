"""Cutting parameters along their named axes: by tensor parallelism from outside, and by models that are defined for a
number of tensor ranks.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from models.params import Axis, ParamSpec, Parts

TENSOR_AXES = ("heads", "kv_heads", "ffn", "vocab")
# What only a model that is defined for ranks splits over them; those of a mesh hold all of it.
WIDTH_AXIS = "expert_ffn"
STACK_AXIS = "experts"


@dataclasses.dataclass(frozen=True)
class Part:
    """Number `index` of `count` equal parts."""

    index: int = 0
    count: int = 1


WHOLE = Part()


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


def divides(spec: ParamSpec) -> bool:
    """Whether parts of a branch have parts of this parameter. Stacks of experts are none: they run those of all parts
    at once (`models.ffn.experts`)."""
    names = {axis.name for axis in named_axes(spec)}
    return STACK_AXIS not in names and not names.isdisjoint((*TENSOR_AXES, WIDTH_AXIS))


def named_axes(spec: ParamSpec) -> list[Axis]:
    dims = [dim.axes if isinstance(dim, Parts) else (dim,) for dim in spec.axes]
    return [axis for axes in dims for axis in axes if axis is not None]


def cut(whole: Tensor, spec: ParamSpec, part: Part, held: Part = WHOLE) -> Tensor:
    """That part of a parameter, of which `whole` is what tensor rank `held` holds."""
    count = part.count // held.count
    for dim, axes in enumerate(spec.axes):
        parts = axes if isinstance(axes, Parts) else Parts((spec.shape[dim],), (axes,))
        if not any(axis is not None and axis.name in (*TENSOR_AXES, WIDTH_AXIS) for axis in parts.axes):
            continue
        pieces, start = [], 0
        for size, axis in zip(parts.sizes, parts.axes, strict=True):
            first, length = 0, size
            if axis is not None and axis.name in TENSOR_AXES:
                size = split(axis, size, 0, held.count)[1]
                here = Axis(axis.name, max(1, axis.groups // held.count))
                first, length, _ = split(here, size, part.index - held.index * count, count)
            elif axis is not None and axis.name == WIDTH_AXIS:
                first, length, _ = split(axis, size, part.index, part.count)
            pieces.append(whole.narrow(dim, start + first, length))
            start += size
        whole = torch.cat(pieces, dim) if len(pieces) > 1 else pieces[0]
    return whole


@contextlib.contextmanager
def as_rank(module: nn.Module, part: Part, held: Part, called: Collection[nn.Module] = ()) -> Iterator[None]:
    """Within it, `module` has that part of its parameters; see `cut`.

    A piece is an attribute of the instance, found before the parameter of the same name, as the copies of
    `parallel.precision` are. called: modules inside whose parameters are there during their calls only, and so are
    their pieces.
    """
    before: list[tuple[nn.Module, str, object]] = []

    def replace(owner: nn.Module, name: str, value: object) -> None:
        before.append((owner, name, owner.__dict__.get(name)))
        owner.__dict__[name] = value

    def visit(owner: nn.Module) -> None:
        if owner in seen:
            return
        seen.add(owner)
        for name, spec in owner.__dict__.get("param_specs", {}).items():
            if getattr(owner, name) is not None and divides(spec):
                replace(owner, name, cut(getattr(owner, name), spec, part, held))
        for child in owner.children():
            if child in called:
                replace(child, "forward", within(child, part, held))
            else:
                visit(child)

    seen: set[nn.Module] = set()
    try:
        visit(module)
        yield
    finally:
        for owner, name, old in reversed(before):
            if old is None:
                del owner.__dict__[name]
            else:
                owner.__dict__[name] = old


def within(module: nn.Module, part: Part, held: Part) -> Callable[..., Any]:
    """Its `forward`, as that part."""
    forward = module.forward

    def run(*args: Any, **kwargs: Any) -> Any:
        with as_rank(module, part, held):
            return forward(*args, **kwargs)

    return run
