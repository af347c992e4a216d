"""Sets of ranks that communicate."""

import dataclasses
from datetime import timedelta

import torch
import torch.distributed as dist


@torch.compiler.disable()
def all_reduce_(x: torch.Tensor, group: dist.ProcessGroup | None) -> None:
    """In place. Compiled, it would also change what torch.cat made x from (docs/experiments.md)."""
    dist.all_reduce(x, group=group)


@dataclasses.dataclass(frozen=True)
class Ranks:
    """A set of ranks that this one communicates with. group is None when it is alone."""

    size: int = 1
    index: int = 0
    group: dist.ProcessGroup | None = None

    def sum_(self, x: torch.Tensor) -> torch.Tensor:
        """All-reduce in place."""
        if self.size > 1:
            all_reduce_(x, self.group)
        return x


def subgroup(rows: list[list[int]], timeout: timedelta | None) -> dist.ProcessGroup:
    """This rank's group among `rows`, which all ranks make together."""
    group, _ = dist.new_subgroups_by_enumeration(rows, timeout=timeout)
    assert isinstance(group, dist.ProcessGroup)
    return group
