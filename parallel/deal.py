"""Work that needs whole tensors, dealt out over the ranks that hold their pieces.

Each whole tensor is computed on one rank of the pipeline stage and handed to the others, so that the work of a step is
shared and all ranks get the same bits.
"""

from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from models.params import ParamSpec, is_matrices
from parallel.gradients import Held
from parallel.mesh import Mesh
from parallel.shards import whole, write


def on_whole(
    parameters: list[Held],
    values: list[Tensor],
    mesh: Mesh,
    function: Callable[[Tensor, ParamSpec], Tensor],
    needs_whole: Callable[[Held], bool],
) -> Iterator[tuple[Held, Tensor]]:
    """(parameter, `function(value)` cut like it) for every parameter (a collective of the pipeline stage).

    values: sharded as the parameters are. function: from a whole tensor and its spec to one of the same shape and type.
    needs_whole: where it says no, pieces are enough for `function`, and each rank calls it on its own.
    """
    owners = deal([held.shard.spec if needs_whole(held) else None for held in parameters], mesh.stage.size)
    # All are gathered before the first is computed: a rank at work would keep the others waiting in the next gather.
    mine: dict[int, Tensor] = {}
    for index, (held, value) in enumerate(zip(parameters, values, strict=True)):
        if owners[index] is not None:
            full = whole(value, held.shard, mesh)
            if owners[index] == mesh.stage.index:
                mine[index] = full
    for index in mine:
        mine[index] = function(mine[index], parameters[index].shard.spec)
    for index, (held, value) in enumerate(zip(parameters, values, strict=True)):
        owner, out = owners[index], torch.empty_like(value)
        if owner is None:
            own, target = (x.to_local() if isinstance(x, DTensor) else x for x in (value, out))
            if own.numel():
                target.copy_(function(own, held.shard.spec))
        else:
            full = mine.pop(index, None)
            if full is None:
                full = torch.empty(held.shard.spec.shape, dtype=value.dtype, device=mesh.device)
            if mesh.stage.size > 1:
                dist.broadcast(full, group=mesh.stage.group, group_src=owner)
            write(out, held.shard, full)
        yield held, out


def deal(specs: list[ParamSpec | None], ranks: int) -> list[int | None]:
    """Which rank computes each whole tensor, None for those that have none: the largest first, to the least busy."""
    load = [0] * ranks
    owners: list[int | None] = [None] * len(specs)
    sizes = [0 if spec is None else torch.Size(spec.shape).numel() * min(spec.shape[-2:]) for spec in specs]
    for index in sorted(range(len(specs)), key=lambda i: -sizes[i]):
        if specs[index] is not None:
            owners[index] = load.index(min(load))
            load[owners[index]] += sizes[index]  # type: ignore[index]
    return owners


def needs_whole(held: Held) -> bool:
    """Whether ranks may hold parts of matrices. A stack that is split along itself alone is pieces of whole ones."""
    spec, segments = held.shard.spec, held.shard.segments
    return not is_matrices(spec) or any(
        sum(length for _, length in runs) < size for runs, size in zip(segments[1:], spec.shape[1:], strict=True)
    )
