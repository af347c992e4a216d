"""Collectives with gradients. Each backward is the exact adjoint: what was gathered is reduce-scattered, and so on.

All act on plain local tensors. A rank's loss is its share of a global sum, so gradients add up over ranks.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.ranks import Ranks


def all_gather(x: Tensor, dim: int, ranks: Ranks) -> Tensor:
    """Concatenate every rank's x along dim, without gradient."""
    if ranks.size == 1:
        return x
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(ranks.size)]
    dist.all_gather(parts, x.contiguous(), group=ranks.group)
    return torch.cat(parts, dim)


def reduce_scatter(x: Tensor, dim: int, ranks: Ranks) -> Tensor:
    """This rank's piece of the sum of every rank's x, along dim, without gradient."""
    if ranks.size == 1:
        return x
    pieces = torch.stack(x.chunk(ranks.size, dim))
    out = torch.empty_like(pieces[0])
    reduce_scatter_rows(out, pieces.flatten(0, 1), ranks)
    return out


def reduce_scatter_rows(out: Tensor, x: Tensor, ranks: Ranks, async_op: bool = False) -> dist.Work | None:
    """As `torch.distributed.reduce_scatter_tensor`, by the name that this torch has for it without a warning."""
    collective = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    return collective(out, x, group=ranks.group, async_op=async_op)


def all_gather_rows(out: Tensor, x: Tensor, ranks: Ranks, async_op: bool = False) -> dist.Work | None:
    """As `torch.distributed.all_gather_into_tensor`, likewise."""
    collective = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    return collective(out, x, group=ranks.group, async_op=async_op)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, ranks: Ranks) -> Tensor:
        ctx.dim, ctx.ranks = dim, ranks
        return all_gather(x, dim, ranks)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return reduce_scatter(grad, ctx.dim, ctx.ranks), None, None


class _ScatterSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, ranks: Ranks) -> Tensor:
        ctx.dim, ctx.ranks = dim, ranks
        return reduce_scatter(x, dim, ranks)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return all_gather(grad, ctx.dim, ctx.ranks), None, None


class _SumAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return ranks.sum_(x.clone())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return ctx.ranks.sum_(grad.clone()), None


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, receive: list[int], send: list[int], ranks: Ranks) -> Tensor:
        ctx.receive, ctx.send, ctx.ranks = receive, send, ranks
        out = x.new_empty((sum(receive), *x.shape[1:]))
        dist.all_to_all_single(out, x.contiguous(), receive, send, group=ranks.group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        return _AllToAll.apply(grad, ctx.send, ctx.receive, ctx.ranks), None, None, None


def gather(x: Tensor, dim: int, ranks: Ranks) -> Tensor:
    """All-gather along dim; backward reduce-scatters."""
    return x if ranks.size == 1 else _Gather.apply(x, dim, ranks)


def scatter_sum(x: Tensor, dim: int, ranks: Ranks) -> Tensor:
    """Reduce-scatter along dim; backward all-gathers."""
    return x if ranks.size == 1 else _ScatterSum.apply(x, dim, ranks)


def sum_all(x: Tensor, ranks: Ranks) -> Tensor:
    """All-reduce; backward all-reduces: every rank goes on with the sum, in its own way."""
    return x if ranks.size == 1 else _SumAll.apply(x, ranks)


def all_to_all(x: Tensor, receive: list[int], send: list[int], ranks: Ranks) -> Tensor:
    """Send `send[i]` rows of x to rank i and receive `receive[i]` rows from it; backward sends them back."""
    return x if ranks.size == 1 else _AllToAll.apply(x, receive, send, ranks)
