"""Causal attention by blocks of queries, each a batched product with the keys that it can see.

On CPUs this is two to three times as fast as `F.scaled_dot_product_attention` (docs/experiments.md): the products run
at the speed of large matrices, and what lies above the diagonal or outside the window is never computed.
Shape suffixes: B batch, T sequence, H query heads, J key/value heads, G = H/J queries of a key head, K key and V value
width of a head, N = B*J, Q queries of a block, S keys that the block sees.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from models.kernels.opaque import opaque

BLOCK = 128
# Probabilities up to this many bytes are kept for the backward pass, and more are computed again.
KEPT_BYTES = 256 * 2**20


class Block(NamedTuple):
    """Queries start..stop-1 see keys first..stop-1, but for those of keys masked..stop-1 whose `bias` [1 or B, Q,
    stop - masked] is -inf, and not 0. Adding it takes CPUs a third of the time of filling by a mask."""

    start: int
    stop: int
    first: int
    masked: int
    bias: Tensor


def blocks(
    length: int, documents_BT: Tensor | None, positions_BT: Tensor, window: int | None, dtype: torch.dtype
) -> Iterator[Block]:
    index_T = torch.arange(length, device=positions_BT.device)
    for start in range(0, length, BLOCK):
        stop = min(start + BLOCK, length)
        first = 0 if window is None else max(0, start - window + 1)
        masked = start if documents_BT is None and window is None else first
        queries, keys = slice(start, stop), slice(masked, stop)
        hidden = (index_T[keys] > index_T[queries, None])[None]
        if documents_BT is not None:
            hidden = hidden | (documents_BT[:, queries, None] != documents_BT[:, None, keys])
        if window is not None:
            hidden = hidden | (positions_BT[:, queries, None] - positions_BT[:, None, keys] >= window)
        bias = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, -torch.inf)
        yield Block(start, stop, first, masked, bias)


def attend_blocked(
    q_BTHK: Tensor,
    k_BTJK: Tensor,
    v_BTJV: Tensor,
    positions_BT: Tensor,
    documents_BT: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    """softmax(q k / sqrt(K)) v over the tokens of a query's document that are not later and within the window.

    Tokens lie in the order of their positions. Returns [B, T, H, V].
    """
    return _Blocked.apply(q_BTHK, k_BTJK, v_BTJV, positions_BT, documents_BT, window)


def by_key_head(x_BTHK: Tensor, heads: int) -> Tensor:
    """[B, T, H, K] to [N, G, T, K]."""
    return x_BTHK.unflatten(2, (heads, -1)).permute(0, 2, 3, 1, 4).flatten(0, 1).contiguous()


def by_token(x_NGTK: Tensor, batch: int) -> Tensor:
    """The way back."""
    return x_NGTK.unflatten(0, (batch, -1)).permute(0, 3, 1, 2, 4).flatten(2, 3)


def probabilities(q_NGTK: Tensor, k_NTK: Tensor, block: Block, batch: int) -> Tensor:
    """[N, G*Q, S]; the softmax adds up in at least float32."""
    groups = q_NGTK.shape[1]
    score = torch.bmm(q_NGTK[:, :, block.start : block.stop].flatten(1, 2), k_NTK[:, block.first : block.stop].mT)
    shaped = score.view(batch, -1, groups, block.stop - block.start, block.stop - block.first)
    shaped[..., block.masked - block.first :] += block.bias[:, None, None]
    return score.softmax(-1)


# Opaque to torch.compile, because its own softmax and scattering of slices are slower (docs/experiments.md).
@opaque
def _forward(
    q_BTHK: Tensor,
    k_BTJK: Tensor,
    v_BTJV: Tensor,
    positions_BT: Tensor,
    documents_BT: Tensor | None,
    window: int | None,
) -> tuple[Tensor, list[Tensor]]:
    """The output, and for the backward pass the inputs by key head and, unless they are large, the probabilities."""
    batch, length, heads, width = q_BTHK.shape
    key_heads = k_BTJK.shape[2]
    q_NGTK = by_key_head(q_BTHK * width**-0.5, key_heads)
    # Copies even where they lie as wanted: an operator returns none of its arguments.
    copies = (x.transpose(1, 2).clone(memory_format=torch.contiguous_format) for x in (k_BTJK, v_BTJV))
    k_NTK, v_NTV = (x.flatten(0, 1) for x in copies)
    out_NGTV = q_NGTK.new_empty(*q_NGTK.shape[:3], v_NTV.shape[-1])
    keep = batch * heads * length * length // 2 * q_NGTK.element_size() <= KEPT_BYTES
    kept = []
    for block in blocks(length, documents_BT, positions_BT, window, q_BTHK.dtype):
        p_NQS = probabilities(q_NGTK, k_NTK, block, batch)
        out_NQV = torch.bmm(p_NQS, v_NTV[:, block.first : block.stop])
        out_NGTV[:, :, block.start : block.stop] = out_NQV.unflatten(1, (q_NGTK.shape[1], -1))
        kept += [p_NQS] if keep else []
    return by_token(out_NGTV, batch), [q_NGTK, k_NTK, v_NTV, *kept]


@opaque
def _backward(
    grad_BTHV: Tensor, saved: list[Tensor], positions_BT: Tensor, documents_BT: Tensor | None, window: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    q_NGTK, k_NTK, v_NTV, *kept = saved
    batch, groups = grad_BTHV.shape[0], q_NGTK.shape[1]
    grad_NGTV = by_key_head(grad_BTHV, k_NTK.shape[0] // batch)
    # Several blocks add to a key's gradient, which bfloat16 would round each time.
    wide = torch.promote_types(q_NGTK.dtype, torch.float32)
    dq_NGTK = torch.empty_like(q_NGTK)
    dk_NTK, dv_NTV = torch.zeros_like(k_NTK, dtype=wide), torch.zeros_like(v_NTV, dtype=wide)
    for index, block in enumerate(blocks(q_NGTK.shape[2], documents_BT, positions_BT, window, q_NGTK.dtype)):
        queries, keys = slice(block.start, block.stop), slice(block.first, block.stop)
        p_NQS = kept[index] if kept else probabilities(q_NGTK, k_NTK, block, batch)
        grad_NQV = grad_NGTV[:, :, queries].flatten(1, 2)
        dv_NTV[:, keys] += torch.bmm(p_NQS.mT, grad_NQV)
        dp_NQS = torch.bmm(grad_NQV, v_NTV[:, keys].mT)
        ds_NQS = torch.ops.aten._softmax_backward_data(dp_NQS, p_NQS, -1, p_NQS.dtype)
        dq_NGTK[:, :, queries] = torch.bmm(ds_NQS, k_NTK[:, keys]).unflatten(1, (groups, -1))
        dk_NTK[:, keys] += torch.bmm(ds_NQS.mT, q_NGTK[:, :, queries].flatten(1, 2))
    dq_BTHK = by_token(dq_NGTK, batch) * q_NGTK.shape[-1] ** -0.5
    dk_BTJK, dv_BTJV = (
        x.unflatten(0, (batch, -1)).transpose(1, 2).to(q_NGTK.dtype, copy=True) for x in (dk_NTK, dv_NTV)
    )
    return dq_BTHK, dk_BTJK, dv_BTJV


class _Blocked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_BTHK: Tensor,
        k_BTJK: Tensor,
        v_BTJV: Tensor,
        positions_BT: Tensor,
        documents_BT: Tensor | None,
        window: int | None,
    ) -> Tensor:
        out_BTHV, saved = _forward(q_BTHK, k_BTJK, v_BTJV, positions_BT, documents_BT, window)
        ctx.window = window
        ctx.save_for_backward(positions_BT, documents_BT, *saved)
        return out_BTHV

    @staticmethod
    def backward(ctx: Any, grad_BTHV: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        positions_BT, documents_BT, *saved = ctx.saved_tensors
        return *_backward(grad_BTHV, saved, positions_BT, documents_BT, ctx.window), None, None, None
