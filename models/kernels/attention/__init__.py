"""Causal attention over packed documents: the way that is fast on the device at hand.

Shape suffixes: B batch, T sequence, H query heads, J key/value heads, K key and V value width of a head.
"""

import torch
from torch import Tensor

from models.kernels.attention.blocked import attend_blocked
from models.kernels.attention.reference import as_bias, as_gated_bias, attend, visibility

__all__ = ["as_bias", "as_gated_bias", "attend", "attend_causal", "visibility"]


def attend_causal(
    q_BTHK: Tensor,
    k_BTJK: Tensor,
    v_BTJV: Tensor,
    positions_BT: Tensor,
    documents_BT: Tensor | None,
    window: int | None,
) -> Tensor:
    """Every token attends to those of its document that are not later, and within the window. Returns [B, T, H, V].

    By blocks on CPUs; elsewhere by torch's own kernels, which are faster there.
    """
    if q_BTHK.device.type == "cpu":
        return attend_blocked(q_BTHK, k_BTJK, v_BTJV, positions_BT, documents_BT, window)
    if documents_BT is None and window is None:
        return attend(q_BTHK, k_BTJK, v_BTJV, None)
    if documents_BT is None:
        documents_BT = torch.zeros_like(positions_BT)
    visible = visibility(positions_BT, documents_BT, positions_BT, documents_BT, window)
    return attend(q_BTHK, k_BTJK, v_BTJV, as_bias(visible, q_BTHK.dtype))
