"""A linear recurrence, one token after another: the definition, and the way to decode.

Shape suffixes: B batch, T sequence, H key heads, J value heads, K key and V value width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from models.kernels.linear.operands import prepare


def recurrent(
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
) -> tuple[Tensor, Tensor]:
    """Value head j uses key head j // (J / H).

    g: log decay, <= 0, [B, T, J] or per key channel [B, T, J, K]; None decays nothing. beta: write strength of the
    delta rule, or None for plain writes; with it, k of unit length makes a contracting state when beta <= 2. value_g:
    log decay per value channel, in place of both. It starts from `state`, begins anew where the document id changes,
    and passes over padding (id -1).
    Returns (o [B, T, J, V] in v's type, state [B, J, K, V] after the last token, at least float32).
    """
    operands = prepare(q_BTHK, k_BTHK, v_BTJV, g, beta_BTJ, scale, value_g_BTJV, documents_BT, state_BJKV)
    q, k, v, g, beta, segments_BT, state = operands
    groups = v.shape[2] // k.shape[2]
    q, k = q.repeat_interleave(groups, 2), k.repeat_interleave(groups, 2)
    same_BT = F.pad(segments_BT[:, 1:] == segments_BT[:, :-1], (1, 0), value=True)
    # Over the state's rows or its columns: [B, T, J, 1 or K, 1], or [B, T, J, 1, V].
    decay = (g.exp() * same_BT[..., None, None]).unsqueeze(-1 if value_g_BTJV is None else -2)
    outs = []
    for t in range(q.shape[1]):
        state = decay[:, t] * state
        u_BJV = v[:, t]
        if beta is not None:
            u_BJV = beta[:, t] * (u_BJV - torch.einsum("bjkv,bjk->bjv", state, k[:, t]))
        state = state + torch.einsum("bjk,bjv->bjkv", k[:, t], u_BJV)
        outs.append(torch.einsum("bjkv,bjk->bjv", state, q[:, t]))
    return torch.stack(outs, 1).to(v_BTJV.dtype), state
