"""The gated delta rule in plain torch, token by token and in chunks (arXiv 2412.06464; chunk form: arXiv 2406.06484).

    S_t = (I - beta_t k_t k_t^T) exp(g_t) S_{t-1} + beta_t k_t v_t^T        o_t = scale * S_t^T q_t

Value head j uses key head j // R. Both forms start from `state`, return the last state, begin anew where the document
id changes, and pass over padding (id -1), which neither decays nor writes.

Shape suffixes: B batch, T sequence, H key heads, J value heads, R = J / H, K key and V value width, N chunks, C chunk.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from models.params import upcast

CHUNK = 64


class Inputs(NamedTuple):
    """What both forms work on: everything at least float32, gates zero at padding.

    segments_BT: 0, 1, ... along a row, one number per document; padding continues the one before it.
    """

    q_BTHK: Tensor
    k_BTHK: Tensor
    v_BTJV: Tensor
    beta_BTJ: Tensor
    g_BTJ: Tensor
    segments_BT: Tensor
    state_BJKV: Tensor


def prepare(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTJV: Tensor,
    beta_BTJ: Tensor,
    g_BTJ: Tensor,
    scale: float,
    documents_BT: Tensor | None,
    state_BJKV: Tensor | None,
) -> Inputs:
    q, k, v, beta, g = (upcast(x) for x in (q_BTHK, k_BTHK, v_BTJV, beta_BTJ, g_BTJ))
    if state_BJKV is None:
        state_BJKV = k.new_zeros(k.shape[0], v.shape[2], k.shape[-1], v.shape[-1])
    if documents_BT is None:
        segments_BT = torch.zeros(k.shape[:2], dtype=torch.int64, device=k.device)
    else:
        real_BT1 = (documents_BT >= 0)[..., None]
        beta, g = beta.where(real_BT1, 0), g.where(real_BT1, 0)
        starts = (documents_BT[:, 1:] != documents_BT[:, :-1]) & (documents_BT[:, 1:] >= 0)
        segments_BT = F.pad(starts, (1, 0)).cumsum(1)
    return Inputs(q * scale, k, v, beta, g, segments_BT, upcast(state_BJKV))


def recurrent(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTJV: Tensor,
    beta_BTJ: Tensor,
    g_BTJ: Tensor,
    *,
    scale: float,
    documents_BT: Tensor | None = None,
    state_BJKV: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One token after another: the definition, and the way to decode.

    g: log decay, <= 0. beta: write strength. k: unit length for a contracting state when beta <= 2.
    Returns (o [B, T, J, V] in v's type, state [B, J, K, V] after the last token, at least float32).
    """
    q, k, v, beta, g, segments_BT, state = prepare(
        q_BTHK, k_BTHK, v_BTJV, beta_BTJ, g_BTJ, scale, documents_BT, state_BJKV
    )
    groups = v.shape[2] // k.shape[2]
    q, k = q.repeat_interleave(groups, 2), k.repeat_interleave(groups, 2)
    same_BT = F.pad(segments_BT[:, 1:] == segments_BT[:, :-1], (1, 0), value=True)
    decay_BTJ = g.exp() * same_BT[..., None]
    outs = []
    for t in range(q.shape[1]):
        state = state * decay_BTJ[:, t, :, None, None]
        error_BJV = v[:, t] - torch.einsum("bjkv,bjk->bjv", state, k[:, t])
        state = state + torch.einsum("bjk,bjv->bjkv", k[:, t], beta[:, t, :, None] * error_BJV)
        outs.append(torch.einsum("bjkv,bjk->bjv", state, q[:, t]))
    return torch.stack(outs, 1).to(v_BTJV.dtype), state


def chunked(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTJV: Tensor,
    beta_BTJ: Tensor,
    g_BTJ: Tensor,
    *,
    scale: float,
    documents_BT: Tensor | None = None,
    state_BJKV: Tensor | None = None,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """The same numbers as `recurrent` from matrix products: all chunks at once, then one short step per chunk.

    With D_ij the decay from token j to token i >= j of its document, and d_i that from the chunk's start to i, the
    corrected values are U - W S: (U | W) = (I + M)^-1 diag(beta) (V | diag(d) K), where M = tril(beta (K K^T) D, -1).
    """
    length = q_BTHK.shape[1]
    q, k, v, beta, g, segments_BT, state = prepare(
        q_BTHK, k_BTHK, v_BTJV, beta_BTJ, g_BTJ, scale, documents_BT, state_BJKV
    )
    heads, size = k.shape[2], min(chunk, length)
    missing = -length % size
    q, k, v, beta, g = (cut(pad(x, missing), size, heads) for x in (q, k, v, beta, g))
    segments_BT = torch.cat([segments_BT, segments_BT[:, -1:].expand(-1, missing)], 1)
    segments = segments_BT.unflatten(1, (-1, size))[:, :, None, None]  # [B, N, 1, 1, C]
    last = segments[..., -1:]
    before = torch.cat([segments[:, :1, ..., :1], last[:, :-1]], 1)  # the state's document at a chunk's start

    lower = torch.ones(size, size, dtype=torch.bool, device=g.device).tril()
    seen = lower & (segments[..., :, None] == segments[..., None, :])
    # Sums of g over j < l <= i, one column per j. Differences of one running sum would cancel behind strong gates (an
    # error of 1e-4 in float32 at -50), and are positive above the diagonal: exp reaches inf, whose gradient is nan.
    log_decay = g[..., :, None].where(lower.tril(-1), 0).cumsum(-2)
    decay = log_decay.exp().where(seen, 0)
    from_start = g.cumsum(-1).exp()
    decay_in = from_start * (segments == before)
    decay_out = decay[..., -1, :]
    decay_through = (from_start[..., -1:] * (last == before))[..., None]

    inverse = unit_inverse((beta[..., None] * (k @ k.mT) * decay).tril(-1))
    u = inverse @ (beta[..., None] * v)
    w = inverse @ ((beta * decay_in)[..., None] * k)
    k_out = decay_out[..., None] * k
    state = state.unflatten(1, (heads, -1))
    states, corrected = [], []
    for n in range(u.shape[1]):
        states.append(state)
        corrected.append(u[:, n] - w[:, n] @ state)
        state = decay_through[:, n] * state + k_out[:, n].mT @ corrected[n]
    out = (decay_in[..., None] * q) @ torch.stack(states, 1) + (q @ k.mT * decay) @ torch.stack(corrected, 1)
    out_BTJV = out.flatten(2, 3).transpose(2, 3).flatten(1, 2)[:, :length]
    return out_BTJV.to(v_BTJV.dtype), state.flatten(1, 2)


def pad(x_BT: Tensor, missing: int) -> Tensor:
    """Zeros behind the sequence: tokens that write nothing."""
    return F.pad(x_BT, (0, 0) * (x_BT.dim() - 2) + (0, missing))


def cut(x_BTJ: Tensor, size: int, heads: int) -> Tensor:
    """[B, T, J, ...] to [B, N, H, R, C, ...]; key heads get R = 1, which broadcasts over their value heads."""
    return x_BTJ.unflatten(1, (-1, size)).transpose(2, 3).unflatten(2, (heads, -1))


def unit_inverse(strict_CC: Tensor) -> Tensor:
    """(I + M)^-1 for strictly lower triangular M (last two dimensions), by inverting diagonal blocks of doubling size.

    [[A, 0], [X, B]]^-1 = [[A^-1, 0], [-B^-1 X A^-1, B^-1]]. The series I - M + M^2 - ... is shorter to write, but its
    terms reach 1e17 for repeated keys and cancel. Gradients come from one Newton step at the end, which moves the value
    only by rounding and has the derivative -P dM P of the inverse P; so no block step is kept for backward.
    """
    size = strict_CC.shape[-1]
    index = torch.arange(size, device=strict_CC.device)
    eye = torch.eye(size, dtype=strict_CC.dtype, device=strict_CC.device)
    with torch.no_grad():
        inverse, block = eye, 1
        while block < size:
            pair, half = index // (2 * block), index // block
            joins = (pair[:, None] == pair) & (half[:, None] > half)
            inverse = inverse - inverse @ (strict_CC * joins) @ inverse
            block *= 2
    return inverse + inverse @ (eye - inverse - strict_CC @ inverse)
