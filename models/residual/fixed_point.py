"""Rounding to a fixed-point grid, on which additions are exact and so can be undone."""

import math
from typing import Any

import torch
from torch import Tensor


class _OnGrid(torch.autograd.Function):
    """A Function, because the usual x + (rounded - x).detach() is itself rounded, off the grid."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bits: int) -> Tensor:
        return torch.round(x * 2.0**bits) * 2.0**-bits

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def on_grid(x: Tensor, bits: int) -> Tensor:
    """round(x 2^bits) / 2^bits, with the gradient of the identity.

    Sums of grid points are exact, in any order, while |x| 2^bits < 2^24 in float32 (2^53 in float64).
    """
    return _OnGrid.apply(x, bits)  # type: ignore[return-value]


def check_bits(bits: int, dtype: torch.dtype) -> None:
    """ValueError when `dtype` has no room for values above 1 on the grid."""
    digits = 1 - int(math.log2(torch.finfo(dtype).eps))
    if bits >= digits:
        raise ValueError(
            f"grid_bits is {bits} and the stream is {dtype}, which has {digits} binary digits; use "
            "fewer bits, a stream of more digits, or grid_bits null"
        )
