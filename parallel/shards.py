"""Which piece of every parameter this rank holds, from the axes that the parameter declares.

A parameter is split by its tensor axes (heads, ffn, vocab, kv_heads) over the tensor ranks; one with an expert axis by
that over the expert ranks, and by its width over those that share an expert. What FSDP cuts further is a DTensor on top
of that piece. A kv_heads axis with fewer groups than ranks gives several ranks the same piece.
"""

import dataclasses
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from models.lm import LM
from models.params import ParamSpec, Parts, initial_value, named_specs
from models.pieces import TENSOR_AXES, split
from parallel.collectives import all_gather
from parallel.mesh import Mesh
from parallel.ranks import Ranks

EXPERT_AXES = ("experts",)
EXPERT_WIDTHS = ("expert_ffn",)
Segments = tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True)
class Shard:
    """This rank's piece of one parameter.

    name: global. segments: per dimension, (start, length) runs of the whole tensor. pieces: how many distinct pieces
    the ranks hold; each is held by ranks.size // pieces of them. expert: the piece follows the expert ranks. copy: the
    parameter's owner is on another pipeline stage.
    """

    name: str
    spec: ParamSpec
    segments: tuple[Segments, ...]
    pieces: int
    expert: bool
    copy: bool = False

    def cut(self, whole: Tensor) -> Tensor:
        for dim, runs in enumerate(self.segments):
            whole = torch.cat([whole.narrow(dim, start, length) for start, length in runs], dim)
        return whole

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(sum(length for _, length in runs) for runs in self.segments)


def shard(name: str, spec: ParamSpec, mesh: Mesh, index: int | None = None) -> Shard:
    """The shard of this rank, or of rank `index` of the ranks it is split over."""
    named = [axis for dim in spec.axes for axis in (dim.axes if isinstance(dim, Parts) else (dim,)) if axis is not None]
    expert = any(axis.name in EXPERT_AXES for axis in named)
    ranks = mesh.ep if expert else mesh.tp
    at = ranks.index if index is None else index
    # By axis, which of how many pieces of it.
    places = {name: (at, ranks.size) for name in TENSOR_AXES}
    if expert:
        row, part = divmod(at, mesh.etp)
        places = {name: (row, ranks.size // mesh.etp) for name in EXPERT_AXES}
        places |= {name: (part, mesh.etp) for name in EXPERT_WIDTHS}
    found: dict[str, int] = {}
    segments = []
    for dim, axes in enumerate(spec.axes):
        runs, start = [], 0
        parts = axes if isinstance(axes, Parts) else Parts((spec.shape[dim],), (axes,))
        for size, axis in zip(parts.sizes, parts.axes, strict=True):
            if axis is not None and axis.name in places:
                first, length, distinct = split(axis, size, *places[axis.name])
                group = "experts" if axis.name in EXPERT_AXES else "width"
                found[group] = max(found.get(group, 1), distinct)
                runs.append((start + first, length))
            else:
                runs.append((start, size))
            start += size
        segments.append(tuple(runs))
    return Shard(name, spec, tuple(segments), math.prod(found.values()), expert)


def shards(model: LM, mesh: Mesh) -> Iterator[tuple[nn.Module, str, Shard]]:
    """(module, attribute, shard) of every declared parameter; a copy goes by its owner's name."""
    for name, module, attribute, spec in named_specs(model):
        piece = shard(model.owners.get(name, name), spec, mesh)
        yield module, attribute, dataclasses.replace(piece, copy=name in model.owners)


def cut_parameters(model: LM, mesh: Mesh) -> None:
    """Replace every parameter of a model on the meta device by an empty one of this rank's shape."""
    for module, attribute, piece in shards(model, mesh):
        old = getattr(module, attribute)
        setattr(module, attribute, nn.Parameter(torch.empty(piece.shape, dtype=old.dtype, device=old.device)))


@torch.no_grad()
def write(parameter: Tensor, piece: Shard, whole: Tensor) -> None:
    """Fill a local parameter (plain, or FSDP's DTensor) from the whole tensor."""
    mine = piece.cut(whole)
    if isinstance(parameter, DTensor):
        mesh = parameter.device_mesh
        count, index = mesh.size(-1), mesh.get_local_rank(mesh.ndim - 1)
        chunks = mine.chunk(count)
        mine = chunks[index] if index < len(chunks) else mine[:0]
        parameter = parameter.to_local()
    parameter.copy_(mine)


def fill(model: LM, mesh: Mesh, seed: int) -> None:
    """Initialise every parameter, bit for bit as one process would."""
    for module, attribute, piece in shards(model, mesh):
        write(getattr(module, attribute), piece, initial_value(piece.spec, piece.name, seed))


def whole(value: Tensor, piece: Shard, mesh: Mesh) -> Tensor:
    """The whole tensor from every rank's piece (a collective).

    value: a parameter, its gradient or optimiser state.
    """
    local = value.full_tensor() if isinstance(value, DTensor) else value.detach().clone()
    ranks: Ranks = mesh.ep if piece.expert else mesh.tp
    if piece.pieces == 1:
        return local
    stacked = all_gather(local[None], 0, ranks)
    out = local.new_empty(piece.spec.shape)
    for index in range(ranks.size):
        theirs = shard(piece.name, piece.spec, mesh, index)
        place(out, theirs.segments, stacked[index])
    return out


def place(out: Tensor, segments: tuple[Segments, ...], value: Tensor) -> None:
    """Copy `value` to the positions of `out` that `segments` name."""
    grid = [torch.cat([torch.arange(start, start + length) for start, length in runs]) for runs in segments]
    out[torch.meshgrid(*grid, indexing="ij")] = value
