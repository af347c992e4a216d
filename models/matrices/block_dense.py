"""Block-diagonal, then dense: y = W (diag(B_1 ... B_K) x) (Wei et al., arXiv 2406.16450).

Shape suffixes: N tokens, K blocks, P inputs of a block, Q channels of a block, R = K Q.
"""

import dataclasses
import math
from types import MappingProxyType

from torch import Tensor, nn

from models.limits import at_least
from models.matrices.base import Matrix, MatrixConfig
from models.matrices.blocks import by_block, refuse_uneven
from models.params import Axis, Linear, Normal, declare


@dataclasses.dataclass(frozen=True)
class BlockDenseConfig(MatrixConfig, kind="block_dense"):
    """rank: channels between the two maps. blocks: of the first, among which inputs and channels are shared out."""

    rank: int
    blocks: int = 4

    example = MappingProxyType({"rank": 8, "blocks": 4})

    def __post_init__(self) -> None:
        at_least(self, 1, "rank", "blocks")
        refuse_uneven(self.blocks, "the rank", self.rank)

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
        return BlockDense(self, d_in, d_out, axis, in_axis, init or Normal(0.02), bias)


class BlockDense(Matrix):
    """Split inputs hand each rank whole blocks, and so whole columns of the dense matrix."""

    blocks: nn.Parameter

    def __init__(
        self,
        config: BlockDenseConfig,
        d_in: int,
        d_out: int,
        axis: Axis | None,
        in_axis: Axis | None,
        init: Normal,
        bias: bool,
    ) -> None:
        super().__init__()
        over_blocks = in_axis and Axis(in_axis.name, config.blocks)
        shape = (config.blocks, d_in // config.blocks, config.rank // config.blocks)
        declare(self, "blocks", shape, Normal(1 / math.sqrt(shape[1])), (over_blocks, None, None), role="matrix")
        std = init.std * math.sqrt(d_in / config.rank)
        self.out = Linear(config.rank, d_out, axis=axis, in_axis=over_blocks, init=Normal(std), wide=False, bias=bias)

    def forward(self, x_ND: Tensor) -> Tensor:
        x_NKP = x_ND.unflatten(-1, self.blocks.shape[:2])
        return self.out(by_block(x_NKP, self.blocks).flatten(-2))
