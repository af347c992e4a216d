"""Softmax attention in plain torch, with an explicit mask.

Shape suffixes: B batch, T queries, S keys, H query heads, J key/value heads, K key and V value width of a head.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def visibility(
    positions_BT: Tensor, documents_BT: Tensor, positions_BS: Tensor, documents_BS: Tensor, window: int | None
) -> Tensor:
    """Which keys [B, T, S] a query may see: of its document, not later, within the window. Positions grow within a
    document; padding (document -1) sees its own kind, so that no row of the softmax is empty."""
    distance = positions_BT[:, :, None] - positions_BS[:, None]
    visible = (distance >= 0) & (documents_BT[:, :, None] == documents_BS[:, None])
    return visible if window is None else visible & (distance < window)


def as_bias(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where visible, -inf elsewhere."""
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, -torch.inf)


def as_gated_bias(visible: Tensor, distance_BTS: Tensor, gate_BS: Tensor, dtype: torch.dtype) -> Tensor:
    """`as_bias`, plus the log of each key's gate in [0, 1]. A key with gate 0 is seen by its own token alone, which is
    at distance 0, so that no row of the softmax is empty."""
    open_BS = gate_BS > 0
    log_BS = gate_BS.where(open_BS, 1).log().to(dtype)
    return as_bias(visible & (open_BS[:, None] | (distance_BTS == 0)), dtype) + log_BS[:, None]


def attend(q_BTHK: Tensor, k_BSJK: Tensor, v_BSJV: Tensor, bias_BTS: Tensor | None) -> Tensor:
    """softmax(q k / sqrt(K) + bias) v, causal when there is no bias. Returns [B, T, H, V]."""
    out = F.scaled_dot_product_attention(
        q_BTHK.transpose(1, 2),
        k_BSJK.transpose(1, 2),
        v_BSJV.transpose(1, 2),
        attn_mask=None if bias_BTS is None else bias_BTS[:, None],
        is_causal=bias_BTS is None,
        enable_gqa=q_BTHK.shape[2] != k_BSJK.shape[2],
    )
    return out.transpose(1, 2)
