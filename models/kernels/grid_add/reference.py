"""A step of a stream on the grid in plain torch.

Shape suffixes: `...` tokens, D width.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from models.params import RMSNorm, upcast


class _OnGrid(torch.autograd.Function):
    """A Function, because the usual x + (rounded - x).detach() is itself rounded, off the grid."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bits: int) -> Tensor:
        ctx.dtype = x.dtype
        return torch.round(upcast(x) * 2.0**bits) * 2.0**-bits

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0].to(ctx.dtype), None


def on_grid(x: Tensor, bits: int | None) -> Tensor:
    """round(x 2^bits) / 2^bits, at least in float32, with the gradient of the identity. bits: None is no grid.

    Sums of grid points are exact, in any order, while |x| 2^bits < 2^24 in float32 (2^53 in float64).
    """
    return x if bits is None else _OnGrid.apply(x, bits)  # type: ignore[return-value]


def grid_add(
    x_D: Tensor, added: tuple[Tensor, ...], factor: float, bits: int | None, norm: RMSNorm | None
) -> tuple[Tensor, Tensor | None]:
    """x + on_grid(factor * the sum of what is added), and its norm, if there is one. With nothing to add, x."""
    if added:
        total_D = functools.reduce(torch.add, added)
        x_D = x_D + on_grid(total_D if factor == 1 else factor * total_D, bits)
    return x_D, None if norm is None else norm(x_D)
