"""What the forms of a linear recurrence work on.

Shape suffixes: B batch, T sequence, H key heads, J value heads, K key and V value width.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from models.params import upcast


class Operands(NamedTuple):
    """Everything at least float32. Padding neither decays nor writes.

    g: log decay per value head [B, T, J, 1], per key channel [B, T, J, K] or per value channel [B, T, J, V]. beta:
    [B, T, J, 1], or None without corrections. segments: 0, 1, ... along a row, one number per document; padding
    continues the one before it.
    """

    q_BTHK: Tensor
    k_BTHK: Tensor
    v_BTJV: Tensor
    g: Tensor
    beta_BTJ1: Tensor | None
    segments_BT: Tensor
    state_BJKV: Tensor


def prepare(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTJV: Tensor,
    g: Tensor | None,
    beta_BTJ: Tensor | None,
    scale: float,
    value_g_BTJV: Tensor | None,
    documents_BT: Tensor | None,
    state_BJKV: Tensor | None,
) -> Operands:
    if value_g_BTJV is not None:
        assert g is None and beta_BTJ is None, "decays of value channels go with plain writes alone"
        g = value_g_BTJV
    q, k, v = upcast(q_BTHK), upcast(k_BTHK), upcast(v_BTJV)
    beta = None if beta_BTJ is None else upcast(beta_BTJ)[..., None]
    g = v.new_zeros(*v.shape[:3], 1) if g is None else upcast(g if g.dim() == 4 else g[..., None])
    if state_BJKV is None:
        state_BJKV = k.new_zeros(k.shape[0], v.shape[2], k.shape[-1], v.shape[-1])
    if documents_BT is None:
        segments_BT = torch.zeros(k.shape[:2], dtype=torch.int64, device=k.device)
    else:
        real_BT11 = (documents_BT >= 0)[..., None, None]
        v, g = v.where(real_BT11, 0), g.where(real_BT11, 0)
        beta = None if beta is None else beta.where(real_BT11, 0)
        starts = (documents_BT[:, 1:] != documents_BT[:, :-1]) & (documents_BT[:, 1:] >= 0)
        segments_BT = F.pad(starts, (1, 0)).cumsum(1)
    return Operands(q * scale, k, v, g, beta, segments_BT, upcast(state_BJKV))
