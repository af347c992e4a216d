"""The gradient rule: after the last micro-batch every gradient is summed once over the ranks that saw a part.

The loss is divided by the global token count before backward, so sums are all there is. A parameter's ranks follow from
how it is held: FSDP has summed its own over data and context ranks; plain ones are summed here; pieces that several
tensor ranks hold saw only local tokens or heads, and are summed over those; copies on other stages are summed last.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from parallel.mesh import Mesh
from parallel.ranks import Ranks
from parallel.shards import Shard

# Elements whose squares float32 adds up to 1e-6.
LONGEST_ROW = 2**14


@dataclasses.dataclass
class Held:
    """A parameter as this rank holds it."""

    parameter: torch.nn.Parameter
    shard: Shard

    @property
    def sharded(self) -> bool:
        return isinstance(self.parameter, DTensor)

    @property
    def gradient(self) -> Tensor:
        """The local gradient; made of zeros if the parameter took no part."""
        if self.parameter.grad is None:
            self.parameter.grad = torch.zeros_like(self.parameter)
        grad = self.parameter.grad
        return grad.to_local() if isinstance(grad, DTensor) else grad

    def holder(self, mesh: Mesh) -> tuple[int, int]:
        """(which, of how many): this rank among the ranks of the stage that hold these same elements."""
        ranks = mesh.expert_data if self.shard.expert else mesh.data
        index, count = ranks.index, ranks.size
        if isinstance(self.parameter, DTensor):
            data = self.parameter.device_mesh
            index, count = data.get_local_rank(0) if data.ndim > 1 else 0, count // data.size(-1)
        if not self.shard.expert:
            same = mesh.tp.size // self.shard.pieces
            index, count = index * same + mesh.tp.index % same, count * same
        return index, count


def in_buckets(gradients: list[Tensor], total: Callable[[Tensor], Tensor]) -> None:
    """Replace gradients by their totals. total: of one flat tensor, taken once per dtype."""
    for dtype in sorted({g.dtype for g in gradients}, key=str):
        same = [g for g in gradients if g.dtype == dtype]
        flat = total(torch.cat([g.reshape(-1) for g in same]))
        for gradient, part in zip(same, flat.split([g.numel() for g in same]), strict=True):
            gradient.copy_(part.view_as(gradient))


def sum_bucket(gradients: list[Tensor], ranks: Ranks) -> None:
    """Sum over ranks that all hold the same elements."""
    if ranks.size > 1:
        in_buckets(gradients, ranks.sum_)


def sum_pieces(gradients: list[Tensor], pieces: int, tp: Ranks) -> None:
    """Sum over the tensor ranks that hold the same piece: each piece has a slot in the all-reduced buffer."""
    slot = tp.index * pieces // tp.size

    def total(flat: Tensor) -> Tensor:
        slots = flat.new_zeros((pieces, flat.numel()))
        slots[slot] = flat
        return tp.sum_(slots)[slot]

    in_buckets(gradients, total)


@torch.no_grad()
def reduce(parameters: Iterable[Held], mesh: Mesh, shared: Mapping[str, Ranks]) -> None:
    """Sum every gradient over the ranks that saw a part of it. Call once per step, on all ranks.

    shared: for parameters with copies, the stages that hold one.
    """
    parameters = list(parameters)
    sum_bucket([h.gradient for h in parameters if not h.sharded and not h.shard.expert], mesh.data)
    sum_bucket([h.gradient for h in parameters if not h.sharded and h.shard.expert], mesh.expert_data)
    dense = [h for h in parameters if not h.shard.expert]
    sum_bucket([h.gradient for h in dense if h.shard.pieces == 1], mesh.tp)
    for pieces in sorted({h.shard.pieces for h in dense if 1 < h.shard.pieces < mesh.tp.size}):
        sum_pieces([h.gradient for h in dense if h.shard.pieces == pieces], pieces, mesh.tp)
    for ranks, names in by_ranks(shared):
        copies = [[h.gradient for h in parameters if h.shard.name == name] for name in names]
        totals = [torch.stack(same).sum(0) for same in copies if same]
        sum_bucket(totals, ranks)
        for same, total in zip(filter(None, copies), totals, strict=True):
            for gradient in same:
                gradient.copy_(total)


def by_ranks(shared: Mapping[str, Ranks]) -> list[tuple[Ranks, list[str]]]:
    """The names that the same ranks share, in an order that is the same on all."""
    found: dict[Ranks, list[str]] = {}
    for name, ranks in shared.items():
        found.setdefault(ranks, []).append(name)
    return list(found.items())


@torch.no_grad()
def norm(parameters: Iterable[Held], mesh: Mesh) -> Tensor:
    """The global L2 norm of all gradients (float64, shape []), every element counted once."""
    total = torch.zeros((), dtype=torch.float64, device=mesh.device)
    for held in parameters:
        if not held.shard.copy:
            total += square(held.gradient) / held.holder(mesh)[1]
    if dist.is_initialized():
        dist.all_reduce(total)
    return total.sqrt()


def square(gradient: Tensor) -> Tensor:
    """The squared L2 norm (float64, shape []). Rows first, in their own type: the copy in float64 that a norm of all
    elements makes takes CPUs fifteen times as long. Long rows, and what has none, go by that copy: float32 loses digits
    of a long sum, a thousandth of one over a flat buffer of 28M elements."""
    if gradient.dim() > 1 and gradient.shape[-1] <= LONGEST_ROW:
        gradient = torch.linalg.vector_norm(gradient, dim=-1)
    return torch.linalg.vector_norm(gradient, dtype=torch.float64).square()


def clip_factor(max_norm: float, global_norm: Tensor) -> float:
    """What gradients of this norm are multiplied by, 1 or less, so that it is at most max_norm."""
    return float((max_norm / (global_norm + 1e-6)).clamp(max=1.0))


@torch.no_grad()
def clip(parameters: Iterable[Held], max_norm: float, global_norm: Tensor) -> None:
    """Scale all gradients so that the global norm is at most max_norm."""
    factor = clip_factor(max_norm, global_norm)
    if factor < 1.0:
        for held in parameters:
            held.gradient.mul_(factor)
