"""Causal attention within hash buckets: each query sees the last few tokens of its own bucket, in several hashings.

Dense, with a mask over all keys, for decoding and as the reference; and sorted by bucket, which takes T * window
instead of T * T. Both give the softmax over the union of what a query's rounds let it see.
Shape suffixes: B batch, T queries, S keys, H heads, R rounds of hashing, K key and V value width of a head, C chunks,
W = window queries of a chunk, X = 2 * window keys that they may see, N sorted places.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# A token sees itself only when it sees nothing else: no other score is this low, and softmax leaves nothing of it.
ALONE = -1e5


class Places(NamedTuple):
    """Where tokens stand in their buckets. buckets_BSHR: int64, of all documents of a row. ranks_BSHR: how many tokens
    of the bucket are before it."""

    buckets_BSHR: Tensor
    ranks_BSHR: Tensor


def places(codes_BSHR: Tensor, documents_BS: Tensor, count: int) -> tuple[Places, Tensor]:
    """The places of tokens with these hash codes, below `count`, and the order [B, S, H, R] that sorts them."""
    # Padding is document -1, and a bucket of its own.
    buckets_BSHR = (documents_BS[:, :, None, None] + 1) * count + codes_BSHR
    order_BSHR = buckets_BSHR.argsort(dim=1, stable=True)
    sorted_BSHR = buckets_BSHR.gather(1, order_BSHR)
    index_S = torch.arange(codes_BSHR.shape[1], device=codes_BSHR.device)[:, None, None]
    opens_BSHR = F.pad(sorted_BSHR[:, 1:] != sorted_BSHR[:, :-1], (0, 0, 0, 0, 1, 0), value=True)
    first_BSHR = torch.where(opens_BSHR, index_S, 0).cummax(dim=1).values
    ranks_BSHR = torch.empty_like(order_BSHR).scatter_(1, order_BSHR, index_S - first_BSHR)
    return Places(buckets_BSHR, ranks_BSHR), order_BSHR


def attend_dense(
    q_BTHK: Tensor,
    k_BSHK: Tensor,
    v_BSHV: Tensor,
    queries: Places,
    keys: Places,
    bias_BS: Tensor | None,
    window: int,
) -> Tensor:
    """Over all keys, of which the queries are the last T. Returns [B, T, H, V]."""
    behind = queries.ranks_BSHR[:, :, None] - keys.ranks_BSHR[:, None]
    same = queries.buckets_BSHR[:, :, None] == keys.buckets_BSHR[:, None]
    seen_BTSH = (same & (behind >= 0) & (behind < window)).any(-1)
    scores_BTSH = torch.einsum("bthk,bshk->btsh", q_BTHK, k_BSHK) * q_BTHK.shape[-1] ** -0.5
    if bias_BS is not None:
        scores_BTSH = scores_BTSH + bias_BS[:, None, :, None]
    length, total = q_BTHK.shape[1], k_BSHK.shape[1]
    index_S = torch.arange(total, device=q_BTHK.device)
    own_TS = index_S[total - length :, None] == index_S
    scores_BTSH = torch.where(own_TS[..., None], ALONE, scores_BTSH.to(v_BSHV.dtype))
    return torch.einsum("btsh,bshv->bthv", scores_BTSH.masked_fill(~seen_BTSH, -torch.inf).softmax(2), v_BSHV)


def attend_sorted(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    own: Places,
    order_BTHR: Tensor,
    bias_BT: Tensor | None,
    window: int,
) -> Tensor:
    """Over the chunk of each query and the one before it, in the order of the buckets. Returns [B, T, H, V]."""
    length = q_BTHK.shape[1]
    short = -length % window
    order_BHRN = order_BTHR.movedim(1, -1)

    def gathered(x_BTH: Tensor) -> Tensor:
        """[B, T, H, ...] to [B, H, R, C, W, ...], filled up behind its end."""
        x_BHRT = x_BTH.transpose(1, 2)[:, :, None].expand(-1, -1, order_BHRN.shape[2], *[-1] * (x_BTH.dim() - 2))
        index = order_BHRN.reshape(*order_BHRN.shape, *[1] * (x_BTH.dim() - 3))
        x_BHRN = x_BHRT.gather(3, index.expand(*order_BHRN.shape, *x_BTH.shape[3:]))
        x_BHRN = F.pad(x_BHRN, (*[0, 0] * (x_BTH.dim() - 3), 0, short))
        return x_BHRN.unflatten(3, (-1, window))

    def with_previous(x_BHRCW: Tensor) -> Tensor:
        """Each chunk behind the one before it: [B, H, R, C, X, ...]."""
        before = F.pad(x_BHRCW[:, :, :, :-1], (*[0, 0] * (x_BHRCW.dim() - 4), 1, 0))
        return torch.cat([before, x_BHRCW], dim=4)

    q_BHRCWK = gathered(q_BTHK)
    k_BHRCXK, v_BHRCXV = with_previous(gathered(k_BTHK)), with_previous(gathered(v_BTHV))
    scores = q_BHRCWK @ k_BHRCXK.transpose(-1, -2) * q_BTHK.shape[-1] ** -0.5
    if bias_BT is not None:
        bias_BTH = bias_BT[..., None].expand(*bias_BT.shape, q_BTHK.shape[2])
        scores = scores + with_previous(gathered(bias_BTH))[..., None, :]
    # In how many rounds a key is seen: of each pair, whether it is in the same bucket, and how far behind.
    buckets, ranks = gathered(own.buckets_BSHR + 1), gathered(own.ranks_BSHR)
    behind = ranks[..., :, None, :] - with_previous(ranks)[..., None, :, :]
    same = buckets[..., :, None, :] == with_previous(buckets)[..., None, :, :]
    seen_in = same & (behind >= 0) & (behind < window)
    times_BHRCWX = seen_in.sum(-1)
    here = torch.arange(seen_in.shape[-1], device=q_BTHK.device)
    seen_BHRCWX = seen_in.movedim(-1, 0)[here, :, :, here].movedim(0, 2)
    place_W = torch.arange(window, device=q_BTHK.device)
    own_WX = place_W[:, None] + window == torch.arange(2 * window, device=q_BTHK.device)
    # Places behind the end see only themselves, so that no row is empty.
    seen_BHRCWX = seen_BHRCWX | own_WX
    scores = torch.where(own_WX, ALONE, scores.to(v_BTHV.dtype)) - times_BHRCWX.clamp_min(1).to(v_BTHV.dtype).log()
    scores = scores.masked_fill(~seen_BHRCWX, -torch.inf)
    mass_BHRN = scores.logsumexp(-1).flatten(3)[..., :length]
    out_BHRNV = (scores.softmax(-1) @ v_BHRCXV).flatten(3, 4)[:, :, :, :length]
    back_BHRT = torch.empty_like(order_BHRN).scatter_(
        3, order_BHRN, torch.arange(length, device=q_BTHK.device).expand_as(order_BHRN)
    )
    share_BHRT = mass_BHRN.gather(3, back_BHRT).softmax(2)
    out_BHRTV = out_BHRNV.gather(3, back_BHRT[..., None].expand(*back_BHRT.shape, v_BTHV.shape[-1]))
    return (share_BHRT[..., None] * out_BHRTV).sum(2).transpose(1, 2)
