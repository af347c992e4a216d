"""Rounding to a fixed-point grid, on which additions are exact and so can be undone."""

import math
from typing import Any

import torch
from torch import Tensor

from models.params import upcast
from models.slots import Opener
from models.state import Entry, State


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


def stream_type(bits: int | None) -> torch.dtype | None:
    """The least type of a stream: one that is on a grid is float32 beside bfloat16 branches."""
    return None if bits is None else torch.float32


def check_bits(bits: int | None, dtype: torch.dtype) -> None:
    """ValueError when a stream on the grid, beside branches of type `dtype`, has no room for values above 1."""
    dtype = torch.promote_types(dtype, torch.float32)
    digits = 1 - int(math.log2(torch.finfo(dtype).eps))
    if bits is not None and bits >= digits:
        raise ValueError(
            f"grid_bits is {bits} and the stream is {dtype}, which has {digits} binary digits; use "
            "fewer bits, a stream of more digits, or grid_bits null"
        )


class TwiceOnGrid(Opener):
    """The embedding, on the grid if there is one, as two entries."""

    def __init__(self, d_model: int, grid_bits: int | None, names: tuple[str, str]) -> None:
        super().__init__(d_model)
        self.grid_bits, self.names = grid_bits, names
        self.writes = tuple(Entry(name, (d_model,), dtype=stream_type(grid_bits)) for name in names)

    def forward(self, x_BTD: Tensor) -> State:
        check_bits(self.grid_bits, x_BTD.dtype)
        x_BTD = on_grid(x_BTD, self.grid_bits)
        return dict(zip(self.names, (x_BTD, x_BTD.clone()), strict=True))
