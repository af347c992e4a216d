"""Residuals whose streams may lie on a fixed-point grid, on which additions are exact and so can be undone."""

import dataclasses
import math

import torch
from torch import Tensor

from models.kernels.grid_add.reference import on_grid
from models.slots import Opener, ResidualConfig
from models.state import Entry, State


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


@dataclasses.dataclass(frozen=True)
class GridConfig(ResidualConfig):
    """A residual that can be undone.

    grid_bits: what makes the streams is rounded to multiples of 2^-grid_bits, with the gradient of the identity. The
    streams, at least float32 beside bfloat16 branches, are then sums without rounding errors, and subtracting restores
    them bit for bit while they stay below 2^(24 - grid_bits): 14 leaves 1024. null: no rounding.
    """

    grid_bits: int | None = None

    takes_shortcut = False

    def __post_init__(self) -> None:
        if self.grid_bits is not None and not 1 <= self.grid_bits <= 52:
            raise ValueError(
                f"grid_bits is {self.grid_bits}; it must lie between 1 and 52, which float64 holds (14 suits float32), "
                "or be null for no grid"
            )

    @property
    def exact(self) -> bool:
        return self.grid_bits is not None

    def check_dtype(self, dtype: torch.dtype) -> None:
        check_bits(self.grid_bits, dtype)


class CopiesOnGrid(Opener):
    """The embedding, on the grid if there is one, as several entries."""

    def __init__(self, d_model: int, grid_bits: int | None, names: tuple[str, ...]) -> None:
        super().__init__(d_model)
        self.grid_bits, self.names = grid_bits, names
        self.writes = tuple(Entry(name, (d_model,), dtype=stream_type(grid_bits)) for name in names)

    def forward(self, x_BTD: Tensor) -> State:
        check_bits(self.grid_bits, x_BTD.dtype)
        x_BTD = on_grid(x_BTD, self.grid_bits)
        return {name: x_BTD.clone() if index else x_BTD for index, name in enumerate(self.names)}
