"""Whether ranks that hold the same elements of a parameter hold the same bits."""

import dataclasses
import zlib
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from parallel.engine import Engine
from parallel.gradients import Held, by_ranks
from parallel.ranks import Ranks

WIDTHS = {1: torch.uint8, 2: torch.int16}
PRIME = 65521
# Elements whose bits are taken at once, as whole numbers of 8 bytes each.
BLOCK = 16 * PRIME


@dataclasses.dataclass(frozen=True)
class Difference:
    """name: of a parameter or buffer. ranks: two of the mesh's that should hold the same of it, and do not; one rank
    twice, whose stages hold a copy each."""

    name: str
    ranks: tuple[int, int]

    def __str__(self) -> str:
        if self.ranks[0] == self.ranks[1]:
            return f"{self.name} differs between the stages of rank {self.ranks[0]}"
        return f"{self.name} differs between ranks {self.ranks[0]} and {self.ranks[1]}"


def digest(x: Tensor) -> Tensor:
    """Of the bits of x, int64 []: the same on all devices of a kind. It weighs bits by where they are."""
    bits = x.detach().contiguous().flatten().view(WIDTHS.get(x.element_size(), torch.int32))
    # Whole numbers that no sum rounds; of 2^48 at most each, and what overflows does so alike everywhere.
    places = torch.arange(1, min(BLOCK, bits.numel()) + 1, device=bits.device) % PRIME + 1
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for block in bits.split(BLOCK):
        total += (block * places[: block.numel()]).sum()
    return total


def held_digests(engine: Engine) -> Iterator[tuple[str, int, Tensor]]:
    """(name, which elements, digest) of every parameter and buffer of this rank, in an order that all ranks of its
    stage share. Ranks with the same `which elements` of a name hold the same."""
    for held in engine.held():
        parameter = held.parameter
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        yield held.shard.name, elements(held), digest(local)
    for model in engine.models:
        for name, buffer in model.named_buffers():
            yield model.owners.get(name, name), 0, digest(buffer)


def elements(held: Held) -> int:
    mesh = held.parameter.device_mesh if isinstance(held.parameter, DTensor) else None
    row = None if mesh is None else (mesh.get_local_rank(mesh.ndim - 1), mesh.size(-1))
    return zlib.crc32(repr((held.shard.segments, row)).encode())


def differences(engine: Engine) -> list[Difference]:
    """Every parameter and buffer that two ranks hold unequally, the first such pair of ranks each; the same list on all
    ranks (a collective)."""
    mine = list(held_digests(engine))
    names = [name for name, _, _ in mine]
    values = torch.tensor([which for _, which, _ in mine], device=engine.mesh.device)
    table = torch.stack([values, torch.stack([value for _, _, value in mine])], 1)
    if not dist.is_initialized():
        return []
    found = unequal(names, table, engine.mesh.stage)
    # Copies on other stages go by the same name: those here are compared, and the first of them with other ranks'.
    copies: dict[str, list[Tensor]] = {name: [] for name in engine.shared}
    for name, row in zip(names, table, strict=True):
        if name in copies:
            copies[name].append(row)
    rank = engine.mesh.rank
    for ranks, shared in by_ranks(engine.shared):
        here = [name for name in shared if copies[name]]
        apart = {name: (rank, rank) for name in here if any((row != copies[name][0]).any() for row in copies[name])}
        found = apart | found
        if here:
            found = unequal(here, torch.stack([copies[name][0] for name in here]), ranks) | found
    everyone: list[dict[str, tuple[int, int]]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, found)
    merged = {name: ranks for theirs in reversed(everyone) for name, ranks in theirs.items()}
    return [Difference(name, ranks) for name, ranks in merged.items()]


def unequal(names: list[str], table_N2: Tensor, ranks: Ranks) -> dict[str, tuple[int, int]]:
    """The names whose digests differ where the elements are the same, and two of the ranks."""
    if ranks.size == 1 or ranks.group is None:
        return {}
    tables = [torch.empty_like(table_N2) for _ in range(ranks.size)]
    dist.all_gather(tables, table_N2, group=ranks.group)
    members = dist.get_process_group_ranks(ranks.group)
    rows = [table.tolist() for table in tables]
    found = {}
    for index, name in enumerate(names):
        first: dict[int, int] = {}
        for place, row in enumerate(rows):
            which, value = row[index]
            other = first.setdefault(which, place)
            if name not in found and rows[other][index][1] != value:
                found[name] = (members[other], members[place])
    return found
