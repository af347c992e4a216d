"""Attention to some of the keys, and how it is put together with that to the others.

    lse = log sum_i exp(lse_i)        out = sum_i exp(lse_i - lse) out_i

over parts i of the keys, with lse_i the log of the sum of the exponentials of a query's scores (Liu et al., Ring
Attention, arXiv 2310.01889). Both passes go by blocks of queries, so that no more than a block's scores are there.
Shape suffixes: B batch, T queries, S keys, J key/value heads, G queries of a key head, K key and V value width, Q
queries of a block.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from models.kernels.attention.by_blocks import product

BLOCK = 128


class Tokens(NamedTuple):
    """A stretch of the sequence. number: of its place among the stretches, which are all of one length."""

    number: int
    positions_BT: Tensor
    documents_BT: Tensor | None


class Sums(NamedTuple):
    """out_BJGTV, at least float32, and lse_BJGT, of the keys so far."""

    out: Tensor
    lse: Tensor


def out_of_reach(queries: Tokens, keys: Tokens, window: int | None) -> bool:
    """Whether no query sees a key: all are later, or too far back."""
    if keys.number > queries.number:
        return True
    nearest = (queries.number - keys.number - 1) * keys.positions_BT.shape[1] + 1
    return window is not None and nearest >= window


def bias_of(
    queries: Tokens, rows: slice, keys: Tokens, gate_BS: Tensor | None, window: int | None, dtype: torch.dtype
) -> Tensor | None:
    """What is added to the scores of some of the queries, [1 or B, Q, S]: -inf hides a key, and a gate's log lowers it;
    None where all keys are seen. A token sees itself, whatever its gate."""
    index_S = torch.arange(keys.positions_BT.shape[1], device=keys.positions_BT.device)
    index_Q = index_S[rows]
    hidden = torch.zeros(1, len(index_Q), len(index_S), dtype=torch.bool, device=index_S.device)
    own = keys.number == queries.number
    if own:
        hidden = hidden | (index_S > index_Q[:, None])
    if queries.documents_BT is not None and keys.documents_BT is not None:
        hidden = hidden | (queries.documents_BT[:, rows, None] != keys.documents_BT[:, None])
    if window is not None:
        hidden = hidden | (queries.positions_BT[:, rows, None] - keys.positions_BT[:, None] >= window)
    if gate_BS is None:
        plain = not own and queries.documents_BT is None and window is None
        return (
            None if plain else torch.zeros(hidden.shape, dtype=dtype).to(hidden.device).masked_fill(hidden, -torch.inf)
        )
    open_BS = gate_BS > 0
    itself = (index_S == index_Q[:, None]) & own
    hidden = hidden | ~(open_BS[:, None] | itself)
    log_BS = gate_BS.where(open_BS, 1).log().to(dtype)
    return log_BS[:, None].expand(-1, len(index_Q), -1).masked_fill(hidden, -torch.inf)


def blocks(
    q_BJGTK: Tensor,
    k_BJSK: Tensor,
    queries: Tokens,
    keys: Tokens,
    gate_BS: Tensor | None,
    window: int | None,
) -> Iterator[tuple[slice, Tensor]]:
    """A block of queries and its scores [B, J, G, Q, S], at least float32. q: divided by sqrt(K)."""
    for start in range(0, q_BJGTK.shape[3], BLOCK):
        rows = slice(start, min(start + BLOCK, q_BJGTK.shape[3]))
        score = product(q_BJGTK[..., rows, :], k_BJSK.mT)
        score = score.to(torch.promote_types(score.dtype, torch.float32))
        bias = bias_of(queries, rows, keys, gate_BS, window, score.dtype)
        yield rows, score if bias is None else score + bias[:, None, None]


def weights(score: Tensor, lse: Tensor) -> Tensor:
    """0 for a query that has seen nothing yet."""
    return (score - lse.clamp_min(torch.finfo(lse.dtype).min)[..., None]).exp()


def attend_part(
    sums: Sums,
    q_BJGTK: Tensor,
    k_BJSK: Tensor,
    v_BJSV: Tensor,
    queries: Tokens,
    keys: Tokens,
    gate_BS: Tensor | None,
    window: int | None,
) -> None:
    """Take some more keys into `sums`, in place."""
    for rows, score in blocks(q_BJGTK, k_BJSK, queries, keys, gate_BS, window):
        own = score.logsumexp(-1)
        out = product(weights(score, own).to(v_BJSV.dtype), v_BJSV).to(score.dtype)
        before = sums.lse[..., rows]
        lse = torch.logaddexp(before, own)
        share = weights(torch.stack([before, own], -1), lse)
        sums.out[..., rows, :] = share[..., :1] * sums.out[..., rows, :] + share[..., 1:] * out
        sums.lse[..., rows] = lse


class Gradients(NamedTuple):
    """What the backward pass adds up, at least float32. gate: None without gates."""

    q_BJGTK: Tensor
    k_BJSK: Tensor
    v_BJSV: Tensor
    gate_BS: Tensor | None


def attend_part_backward(
    into: Gradients,
    grad_BJGTV: Tensor,
    delta_BJGT: Tensor,
    lse_BJGT: Tensor,
    q_BJGTK: Tensor,
    k_BJSK: Tensor,
    v_BJSV: Tensor,
    queries: Tokens,
    keys: Tokens,
    gate_BS: Tensor | None,
    window: int | None,
) -> None:
    """Add these keys' part to the gradients, in place. delta: of each query, the sum over V of grad and output, less
    the gradient of lse. lse: over all keys."""
    dtype = q_BJGTK.dtype
    for rows, score in blocks(q_BJGTK, k_BJSK, queries, keys, gate_BS, window):
        p = weights(score, lse_BJGT[..., rows])
        grad = grad_BJGTV[..., rows, :]
        flat = p.to(dtype).flatten(2, 3)
        into.v_BJSV.add_(flat.mT @ grad.flatten(2, 3))
        dp = product(grad, v_BJSV.mT).to(p.dtype)
        ds = p * (dp - delta_BJGT[..., rows, None])
        if gate_BS is not None and into.gate_BS is not None:
            open_BS = gate_BS > 0
            into.gate_BS.add_((ds.sum((1, 2, 3)) / gate_BS.where(open_BS, 1)).where(open_BS, 0))
        ds = ds.to(dtype)
        into.q_BJGTK[..., rows, :] += product(ds, k_BJSK)
        into.k_BJSK.add_(ds.flatten(2, 3).mT @ q_BJGTK[..., rows, :].flatten(2, 3))
