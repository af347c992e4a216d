"""What a rank holds of a named tensor, in the terms of torch.distributed.checkpoint: boxes of the whole tensor.

A `Shard` is runs along each dimension (several for fused projections), and FSDP cuts the rows of those once more; every
product of runs is a box. Boxes fit any mesh: what one mesh wrote, another reads by where its own boxes overlap.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor

from parallel.gradients import Held
from parallel.mesh import Mesh


@dataclasses.dataclass(frozen=True)
class Run:
    """`length` consecutive indices of one dimension, from `start` of the whole and from `local` of the piece."""

    start: int
    local: int
    length: int

    def within(self, begin: int, end: int) -> "Run":
        """The part of it at local indices begin..end-1, which a smaller piece numbers from 0; possibly empty."""
        first, last = max(self.local, begin), min(self.local + self.length, end)
        return Run(self.start + first - self.local, first - begin, max(last - first, 0))


@dataclasses.dataclass(frozen=True)
class Piece:
    """A plain tensor that holds `runs` of a whole one of `shape`. Its double-underscore methods are DCP's protocol."""

    local: Tensor
    shape: torch.Size
    runs: tuple[tuple[Run, ...], ...]

    def size(self) -> torch.Size:
        return self.shape

    def boxes(self) -> Iterator[tuple[ChunkStorageMetadata, Tensor]]:
        """Every box that is not empty, and the view of `local` that is its content."""
        for runs in itertools.product(*self.runs):
            if all(run.length for run in runs):
                view = self.local
                for dim, run in enumerate(runs):
                    view = view.narrow(dim, run.local, run.length)
                offsets = torch.Size([run.start for run in runs])
                yield ChunkStorageMetadata(offsets, torch.Size([run.length for run in runs])), view

    def on_host(self) -> "Piece":
        """A copy that does not change when the weights do."""
        return dataclasses.replace(self, local=self.local.detach().to("cpu", copy=True))

    def __create_write_items__(self, fqn: str, _: object) -> list[WriteItem]:
        properties = TensorProperties.create_from_tensor(self.local)
        return [
            WriteItem(
                MetadataIndex(fqn, box.offsets),
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(box, properties, self.shape),
            )
            for box, _ in self.boxes()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [box for box, _ in self.boxes()]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        return next(view for box, view in self.boxes() if box.offsets == index.offset)


def entire(value: Tensor) -> Piece:
    """The piece that is the whole."""
    return Piece(value, value.shape, tuple((Run(0, 0, size),) for size in value.shape))


def piece(held: Held, kept: Tensor | None = None) -> Piece:
    """The piece of a parameter that this rank holds, or `kept`, a plain tensor of the same elements."""
    value, shard = held.parameter.detach(), held.shard
    runs: list[tuple[Run, ...]] = []
    for segments in shard.segments:
        ends = list(itertools.accumulate(length for _, length in segments))
        pairs = zip(segments, ends, strict=True)
        runs.append(tuple(Run(start, end - length, length) for (start, length), end in pairs))
    if isinstance(value, DTensor):
        assert value.placements[-1].is_shard(0), f"{shard.name} is sharded as {value.placements}"
        mesh, rows = value.device_mesh, value.shape[0]
        per_rank = -(-rows // mesh.size(-1))
        begin = min(mesh.get_local_rank(mesh.ndim - 1) * per_rank, rows)
        runs[0] = tuple(run.within(begin, min(begin + per_rank, rows)) for run in runs[0])
        value = value.to_local()
    return Piece(value if kept is None else kept, torch.Size(shard.spec.shape), tuple(runs))


def with_owners(parameters: Iterable[Held], mesh: Mesh) -> Iterator[tuple[Held, bool]]:
    """Every parameter, and whether it is this rank that saves it.

    Ranks that hold the same elements share the saving: each takes the next of the list when it has the least so far,
    which all of them reckon alike without a word. Copies are saved by the stage that owns the parameter.
    """
    sizes: dict[tuple[bool, bool, int], list[int]] = {}
    for held in parameters:
        if held.shard.copy:
            yield held, False
            continue
        index, count = held.holder(mesh)
        saved = sizes.setdefault((held.shard.expert, held.sharded, held.shard.pieces), [0] * count)
        owner = saved.index(min(saved))
        local = held.parameter.to_local() if isinstance(held.parameter, DTensor) else held.parameter
        saved[owner] += local.numel()
        yield held, owner == index
