"""Block-diagonal twice, with a shuffle between (Monarch matrices, arXiv 2204.00595; in FFNs arXiv 2406.16450).

Shape suffixes: N tokens, D inputs, K blocks, P inputs and Q channels of a block of the first map, S outputs of a block
of the second, O outputs.
"""

import dataclasses
import math
from types import MappingProxyType

from torch import Tensor, nn

from models.limits import at_least
from models.matrices.base import Matrix, MatrixConfig
from models.matrices.blocks import by_block, refuse_uneven
from models.params import Axis, Normal, declare


@dataclasses.dataclass(frozen=True)
class BlockShuffleConfig(MatrixConfig, kind="block_shuffle"):
    """blocks: of both maps. Each has as many channels as the narrower side, D / blocks or O / blocks; channel c of the
    first map goes to block c mod `blocks` of the second, so that every output sees every input once there are as many
    channels as blocks."""

    blocks: int = 4

    example = MappingProxyType({"blocks": 4})

    def __post_init__(self) -> None:
        at_least(self, 1, "blocks")

    def build(
        self,
        d_in: int,
        d_out: int,
        *,
        axis: Axis | None = None,
        in_axis: Axis | None = None,
        init: Normal | None = None,
        bias: bool = False,
    ) -> nn.Module:
        refuse_uneven(self.blocks, "the width of what it maps", d_in)
        refuse_uneven(self.blocks, "the width that it maps to", d_out)
        return BlockShuffle(self.blocks, d_in, d_out, axis, in_axis, init or Normal(0.02), bias)


class BlockShuffle(Matrix):
    """Outputs alternate between the second map's blocks, so that a stretch of them is some outputs of every block; a
    stretch of inputs is whole blocks of the first map, and some channels of every block of the second."""

    first: nn.Parameter
    second: nn.Parameter

    def __init__(
        self, blocks: int, d_in: int, d_out: int, axis: Axis | None, in_axis: Axis | None, init: Normal, bias: bool
    ) -> None:
        super().__init__()
        width = min(d_in, d_out) // blocks
        inputs, outputs = d_in // blocks, d_out // blocks
        over_outputs = axis and Axis(axis.name, outputs)
        over_blocks, over_width = (in_axis and Axis(in_axis.name, count) for count in (blocks, width))
        declare(
            self,
            "first",
            (blocks, inputs, width),
            Normal(1 / math.sqrt(inputs)),
            (over_blocks, None, None),
            role="matrix",
        )
        declare(
            self,
            "second",
            (blocks, width, outputs),
            Normal(init.std * math.sqrt(d_in / width)),
            (None, over_width, over_outputs),
            role="matrix",
        )

        if bias:
            self.declare_bias(d_out, over_outputs)

    def forward(self, x_ND: Tensor) -> Tensor:
        x_NKP = x_ND.unflatten(-1, self.first.shape[:2])
        # Channel c is number c // K of block c % K of the second map.
        channels_NQK = by_block(x_NKP, self.first).flatten(-2).unflatten(-1, (-1, self.second.shape[0]))
        out_NO = by_block(channels_NQK.transpose(-1, -2), self.second).transpose(-1, -2).flatten(-2)
        return out_NO if self.bias is None else out_NO + self.bias
