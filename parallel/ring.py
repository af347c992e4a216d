"""Ring attention: keys and values go round the ranks, and no rank ever has those of the whole sequence.

A rank has two stretches of the sequence, one from the front and its mirror image from the end, so that all have the
same work under a causal mask. While it attends to the keys at hand, the next come and these go on. In the backward pass
keys and values go round again, and their gradients behind them, home at last. Source: Liu et al., arXiv 2310.01889;
the stretches as in Brandon et al., Striped Attention, arXiv 2311.09431, but of neighbouring tokens.
Shape suffixes: B batch, T this rank's tokens, J key/value heads, G queries of a key head, K key and V value width.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.kernels.attention.by_blocks import by_head, by_token
from models.kernels.attention.partial import (
    Gradients,
    Sums,
    Tokens,
    attend_part,
    attend_part_backward,
    out_of_reach,
)
from parallel.ranks import Ranks


def stretches(rank: int, ranks: int) -> tuple[int, int]:
    """The numbers of the two that a rank has, of 2 * ranks."""
    return rank, 2 * ranks - 1 - rank


def order(length: int, ranks: int, device: torch.device) -> Tensor:
    """int64 [length]: the place in the sequence of each token, where those of rank 0 come first, then those of rank
    1."""
    index = torch.arange(length, device=device).unflatten(0, (2 * ranks, -1))
    return torch.cat([index[number] for rank in range(ranks) for number in stretches(rank, ranks)])


class Passing:
    """Tensors on their way to the next rank, and those of the rank before on theirs here."""

    def __init__(self, tensors: list[Tensor], ranks: Ranks) -> None:
        after, before = (ranks.index + 1) % ranks.size, (ranks.index - 1) % ranks.size
        self._sent, self._received = [x.contiguous() for x in tensors], [torch.empty_like(x) for x in tensors]
        work = [dist.P2POp(dist.isend, x, group=ranks.group, group_peer=after) for x in self._sent]
        work += [dist.P2POp(dist.irecv, x, group=ranks.group, group_peer=before) for x in self._received]
        self._work = dist.batch_isend_irecv(work)

    def arrived(self) -> list[Tensor]:
        for work in self._work:
            work.wait()
        return self._received


class Reach:
    """Which of a rank's queries see which keys. positions, documents: of all tokens, in the order of the ranks."""

    def __init__(self, ranks: Ranks, positions_BT: Tensor, documents_BT: Tensor | None, window: int | None) -> None:
        self.ranks, self.window = ranks, window
        self.half = positions_BT.shape[1] // (2 * ranks.size)
        self.positions_BT, self.documents_BT = positions_BT, documents_BT

    def tokens(self, rank: int) -> Iterator[tuple[slice, Tokens]]:
        """Each stretch of a rank: where it lies among the rank's tokens."""
        for place, number in enumerate(stretches(rank, self.ranks.size)):
            start = (2 * rank + place) * self.half
            documents = None if self.documents_BT is None else self.documents_BT.narrow(1, start, self.half)
            rows = slice(place * self.half, (place + 1) * self.half)
            yield rows, Tokens(number, self.positions_BT.narrow(1, start, self.half), documents)

    def pairs(self, rank: int) -> Iterator[tuple[slice, slice, Tokens, Tokens]]:
        """(queries' place here, keys' place on `rank`, queries, keys) wherever there is something to see."""
        for q_rows, queries in self.tokens(self.ranks.index):
            for k_rows, keys in self.tokens(rank):
                if not out_of_reach(queries, keys, self.window):
                    yield q_rows, k_rows, queries, keys


def part(x_BT: Tensor | None, rows: slice) -> Tensor | None:
    return None if x_BT is None else x_BT[:, rows]


class Ring(torch.autograd.Function):
    """out [B, T, H, V] and lse [B, T, H]."""

    @staticmethod
    def forward(
        ctx: Any, q_BTHK: Tensor, k_BTJK: Tensor, v_BTJV: Tensor, gate_BT: Tensor | None, reach: Reach
    ) -> tuple[Tensor, Tensor]:
        ranks, heads = reach.ranks, k_BTJK.shape[2]
        q = by_head(q_BTHK * q_BTHK.shape[-1] ** -0.5, heads)
        k, v, gate = k_BTJK.transpose(1, 2).contiguous(), v_BTJV.transpose(1, 2).contiguous(), gate_BT
        wide = torch.promote_types(q.dtype, torch.float32)
        sums = Sums(
            q.new_zeros(*q.shape[:-1], v.shape[-1], dtype=wide), q.new_full(q.shape[:-1], -torch.inf, dtype=wide)
        )
        for step in range(ranks.size):
            passing = Passing([x for x in (k, v, gate) if x is not None], ranks) if step < ranks.size - 1 else None
            for q_rows, k_rows, queries, keys in reach.pairs((ranks.index - step) % ranks.size):
                own = Sums(sums.out[..., q_rows, :], sums.lse[..., q_rows])
                attend_part(
                    own,
                    q[..., q_rows, :],
                    k[:, :, k_rows],
                    v[:, :, k_rows],
                    queries,
                    keys,
                    part(gate, k_rows),
                    reach.window,
                )
            if passing is not None:
                k, v, *rest = passing.arrived()
                gate = rest[0] if rest else None
        ctx.reach = reach
        ctx.save_for_backward(q_BTHK, k_BTJK, v_BTJV, gate_BT, sums.out, sums.lse)
        return by_token(sums.out).to(q_BTHK.dtype), by_token(sums.lse[..., None])[..., 0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BTHV: Tensor, grad_lse_BTH: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q_BTHK, k_BTJK, v_BTJV, gate_BT, out, lse = ctx.saved_tensors
        reach: Reach = ctx.reach
        ranks, heads, scale = reach.ranks, k_BTJK.shape[2], q_BTHK.shape[-1] ** -0.5
        q, grad = by_head(q_BTHK * scale, heads), by_head(grad_BTHV, heads)
        delta = (grad * out).sum(-1) - by_head(grad_lse_BTH[..., None], heads)[..., 0]
        k, v, gate = k_BTJK.transpose(1, 2).contiguous(), v_BTJV.transpose(1, 2).contiguous(), gate_BT
        dq, dk, dv = (torch.zeros_like(x, dtype=out.dtype) for x in (q, k, v))
        dgate = None if gate is None else torch.zeros_like(gate)
        for step in range(ranks.size):
            passing = Passing([x for x in (k, v, gate) if x is not None], ranks) if step < ranks.size - 1 else None
            for q_rows, k_rows, queries, keys in reach.pairs((ranks.index - step) % ranks.size):
                attend_part_backward(
                    Gradients(dq[..., q_rows, :], dk[:, :, k_rows], dv[:, :, k_rows], part(dgate, k_rows)),
                    grad[..., q_rows, :],
                    delta[..., q_rows],
                    lse[..., q_rows],
                    q[..., q_rows, :],
                    k[:, :, k_rows],
                    v[:, :, k_rows],
                    queries,
                    keys,
                    part(gate, k_rows),
                    reach.window,
                )
            dk, dv, *gates = Passing([x for x in (dk, dv, dgate) if x is not None], ranks).arrived()
            dgate = gates[0] if gates else None
            if passing is not None:
                k, v, *rest = passing.arrived()
                gate = rest[0] if rest else None
        dk_BTJK, dv_BTJV = dk.transpose(1, 2).to(k_BTJK.dtype), dv.transpose(1, 2).to(v_BTJV.dtype)
        return by_token(dq * scale).to(q_BTHK.dtype), dk_BTJK, dv_BTJV, dgate, None
