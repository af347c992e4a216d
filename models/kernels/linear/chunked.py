"""A linear recurrence in chunks: the same numbers from matrix products (arXiv 2312.06635; delta rule: 2406.06484).

Shape suffixes: B batch, T sequence, H key heads, J value heads, R = J / H, K key and V value width, N chunks, C chunk.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from models.kernels.linear.decay import ChannelDecay, HeadDecay, ValueDecay
from models.kernels.linear.inverse import unit_inverse
from models.kernels.linear.operands import prepare


def chunk_length(per_channel: bool, sequence: int) -> int:
    """Tokens of a chunk, for counting FLOPs."""
    return min((ChannelDecay if per_channel else HeadDecay).chunk, sequence)


def chunked(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTJV: Tensor,
    g: Tensor | None = None,
    beta_BTJ: Tensor | None = None,
    *,
    scale: float,
    value_g_BTJV: Tensor | None = None,
    documents_BT: Tensor | None = None,
    state_BJKV: Tensor | None = None,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`recurrent`, all chunks at once and then one short step per chunk.

    With D_ij the decay from token j to token i >= j of its document, and d_i that from the chunk's start to i, the
    written values are U - W S: U = V and W = 0 for plain writes; for the delta rule
    (U | W) = (I + M)^-1 diag(beta) (V | d K), where M = tril(beta K K^T D, -1).
    """
    length = q_BTHK.shape[1]
    operands = prepare(q_BTHK, k_BTHK, v_BTJV, g, beta_BTJ, scale, value_g_BTJV, documents_BT, state_BJKV)
    if value_g_BTJV is not None:
        kind = ValueDecay
    else:
        kind = HeadDecay if operands.g.shape[-1] == 1 else ChannelDecay
    heads, size = k_BTHK.shape[2], min(chunk or kind.chunk, length)
    missing = -length % size
    q, k, v, g = (cut(pad(x, missing), size, heads) for x in operands[:4])
    beta = None if operands.beta_BTJ1 is None else cut(pad(operands.beta_BTJ1, missing), size, heads)
    segments_BT = torch.cat([operands.segments_BT, operands.segments_BT[:, -1:].expand(-1, missing)], 1)
    segments = segments_BT.unflatten(1, (-1, size))[:, :, None, None]  # [B, N, 1, 1, C]
    last = segments[..., -1:]
    before = torch.cat([segments[:, :1, ..., :1], last[:, :-1]], 1)  # the state's document at a chunk's start
    lower = torch.ones(size, size, dtype=torch.bool, device=g.device).tril()
    seen = lower & (segments[..., :, None] == segments[..., None, :])
    decay = kind(g, seen, segments == before, last == before)

    u, w = v, None
    if beta is not None:
        inverse = unit_inverse((beta * decay.pairs(k, k)).tril(-1))
        u, w = inverse @ (beta * v), inverse @ (beta * decay.into * k)
    k_out, u_out = decay.leaving(k, u)
    state = operands.state_BJKV.unflatten(1, (heads, -1))
    states, corrected = [], []
    for n in range(u.shape[1]):
        states.append(state)
        left = u_out[:, n]
        if w is not None:
            left = left - w[:, n] @ state
            corrected.append(left)
        state = decay.through[:, n] * state + k_out[:, n].mT @ left
    out = decay.read(q, torch.stack(states, 1)) + decay.mix(q, k, torch.stack(corrected, 1) if corrected else u)
    out_BTJV = out.flatten(2, 3).transpose(2, 3).flatten(1, 2)[:, :length]
    return out_BTJV.to(v_BTJV.dtype), state.flatten(1, 2)


def pad(x_BT: Tensor, missing: int) -> Tensor:
    """Zeros behind the sequence: tokens that write nothing."""
    return F.pad(x_BT, (0, 0) * (x_BT.dim() - 2) + (0, missing))


def cut(x_BTJ: Tensor, size: int, heads: int) -> Tensor:
    """[B, T, J, ...] to [B, N, H, R, C, ...]; key heads get R = 1, which broadcasts over their value heads."""
    return x_BTJ.unflatten(1, (-1, size)).transpose(2, 3).unflatten(2, (heads, -1))
