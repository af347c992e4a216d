"""Rotary position embedding (Su et al., arXiv 2104.09864), in its two pairings.

Shape suffixes: B batch, T sequence, H heads, K head width, R rotated width (even, <= K).
"""

import torch
from torch import Tensor

from models.params import upcast


def angles(positions_BT: Tensor, rotated: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of position * theta^(-2i/R), each [B, T, 1, R/2]."""
    exponent = torch.arange(0, rotated, 2, device=positions_BT.device, dtype=dtype) / rotated
    phase = positions_BT[..., None, None].to(dtype) * theta**-exponent
    return phase.cos(), phase.sin()


def rotate_half(x_BTHK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs (i, i + R/2): the layout of Llama in Hugging Face."""
    rotated = 2 * cos.shape[-1]
    x = upcast(x_BTHK[..., :rotated])
    a, b = x.chunk(2, dim=-1)
    turned = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
    return torch.cat([turned.to(x_BTHK.dtype), x_BTHK[..., rotated:]], dim=-1)


def rotate_interleaved(x_BTHK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs (2i, 2i + 1): the layout of the original paper and of Meta's Llama."""
    rotated = 2 * cos.shape[-1]
    x = upcast(x_BTHK[..., :rotated])
    a, b = x[..., 0::2], x[..., 1::2]
    turned = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)
    return torch.cat([turned.to(x_BTHK.dtype), x_BTHK[..., rotated:]], dim=-1)
