"""Rotary position embedding (Su et al., arXiv 2104.09864), in its two pairings.

Shape suffixes: B batch, T sequence, H heads, K head width, R rotated width (even, <= K).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from models.kernels.blocks import row_blocks
from models.kernels.opaque import opaque
from models.params import upcast

Swap = Callable[[Tensor], Tensor]


def angles(positions_BT: Tensor, rotated: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of position * theta^(-2i/R), each [B, T, 1, R/2]."""
    return _angles(positions_BT, rotated, theta, dtype)


# A compiler would compute them again for each head, and in the backward pass.
@opaque
def _angles(positions_BT: Tensor, rotated: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    exponent = torch.arange(0, rotated, 2, device=positions_BT.device, dtype=dtype) / rotated
    phase = positions_BT[..., None, None].to(dtype) * theta**-exponent
    return phase.cos(), phase.sin()


def rotate_half(x_BTHK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs (i, i + R/2): the layout of Llama in Hugging Face."""
    return rotate(x_BTHK, torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1), swap_halves)


def rotate_interleaved(x_BTHK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs (2i, 2i + 1): the layout of the original paper and of Meta's Llama."""
    both = torch.stack([cos, cos], dim=-1).flatten(-2), torch.stack([-sin, sin], dim=-1).flatten(-2)
    return rotate(x_BTHK, *both, swap_neighbours)


def swap_halves(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([second, first], dim=-1)


def swap_neighbours(x: Tensor) -> Tensor:
    return x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)


def rotate(x_BTHK: Tensor, cos_BT1R: Tensor, sin_BT1R: Tensor, swap: Swap) -> Tensor:
    """x cos + swap(x) sin on the first R channels. `swap` exchanges the two of each pair, and sin has their signs."""
    rotated = cos_BT1R.shape[-1]
    function = turn if torch.compiler.is_compiling() else _Turn.apply
    if rotated == x_BTHK.shape[-1]:
        return function(x_BTHK, cos_BT1R, sin_BT1R, swap)
    return torch.cat([function(x_BTHK[..., :rotated], cos_BT1R, sin_BT1R, swap), x_BTHK[..., rotated:]], dim=-1)


def turn(x_BTHR: Tensor, cos_BT1R: Tensor, sin_BT1R: Tensor, swap: Swap) -> Tensor:
    """In plain torch, which a compiler fuses."""
    x = upcast(x_BTHR)
    return (x * cos_BT1R + swap(x) * sin_BT1R).to(x_BTHR.dtype)


class _Turn(torch.autograd.Function):
    """The same in fewer passes over memory. The gradient of a rotation is the rotation back."""

    @staticmethod
    def forward(ctx: Any, x_BTHR: Tensor, cos_BT1R: Tensor, sin_BT1R: Tensor, swap: Swap) -> Tensor:
        ctx.save_for_backward(cos_BT1R, sin_BT1R)
        ctx.swap = swap
        out_BTHR = torch.empty_like(x_BTHR, memory_format=torch.contiguous_format)
        tokens = (x.flatten(0, 1) for x in (out_BTHR, x_BTHR, cos_BT1R, sin_BT1R))
        out_NHR, x_NHR, cos_N1R, sin_N1R = tokens
        for block in row_blocks(x_NHR):
            x = upcast(x_NHR[block])
            out_NHR[block] = swap(x).mul_(sin_N1R[block]).addcmul_(x, cos_N1R[block])
        return out_BTHR

    @staticmethod
    def backward(ctx: Any, grad_BTHR: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        cos_BT1R, sin_BT1R = ctx.saved_tensors
        return _Turn.apply(grad_BTHR, cos_BT1R, -sin_BT1R, ctx.swap), None, None, None
