"""What a stretch of tokens makes of the state in front of it: through * state + final.

Shape suffixes: B batch, T sequence, H key heads, J value heads, K key and V value width, W = V + K.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from models.kernels.linear.operands import prepare


def passing(
    k_BTHK: Tensor,
    v_BTJV: Tensor,
    g: Tensor | None,
    beta_BTJ: Tensor | None,
    value_g_BTJV: Tensor | None,
    documents_BT: Tensor | None,
    form: Callable[..., tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor]:
    """See `recurrent` for the operands. form: what computes a delta rule.
    Returns (through, final [B, J, K, V]), at least float32.

    through: for plain writes factors that broadcast over the state, [B, J, 1 or K, 1] or [B, J, 1, V]; for the delta
    rule a matrix [B, J, K, K]. 0 where a document begins inside.
    """
    if beta_BTJ is not None:
        return passing_delta(k_BTHK, v_BTJV, g, beta_BTJ, documents_BT, form)
    operands = prepare(k_BTHK, k_BTHK, v_BTJV, g, None, 1.0, value_g_BTJV, documents_BT, None)
    k = operands.k_BTHK.repeat_interleave(v_BTJV.shape[2] // k_BTHK.shape[2], 2)
    last = operands.segments_BT == operands.segments_BT[:, -1:]
    after = F.pad(operands.g[:, 1:], (0, 0, 0, 0, 0, 1)).flip(1).cumsum(1).flip(1)
    stays = after.exp() * last[..., None, None]
    through = operands.g.sum(1).exp() * last[:, 0, None, None]
    if value_g_BTJV is None:
        return through[..., None], torch.einsum("btjk,btjv->bjkv", k * stays, operands.v_BTJV)
    return through[..., None, :], torch.einsum("btjk,btjv->bjkv", k, operands.v_BTJV * stays)


def passing_delta(
    k_BTHK: Tensor,
    v_BTJV: Tensor,
    g: Tensor | None,
    beta_BTJ: Tensor,
    documents_BT: Tensor | None,
    form: Callable[..., tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor]:
    """The recurrence is linear in (values, state): of (v, 0) it makes final, and of (0, 1) through."""
    width, key = v_BTJV.shape[-1], k_BTHK.shape[-1]
    v_BTJW = F.pad(v_BTJV, (0, key))
    eye = torch.eye(key, dtype=torch.promote_types(v_BTJV.dtype, torch.float32), device=v_BTJV.device)
    state_BJKW = F.pad(eye, (width, 0)).expand(v_BTJV.shape[0], v_BTJV.shape[2], -1, -1)
    _, after_BJKW = form(
        k_BTHK, k_BTHK, v_BTJW, g, beta_BTJ, scale=1.0, documents_BT=documents_BT, state_BJKV=state_BJKW
    )
    return after_BJKW[..., width:], after_BJKW[..., :width]
