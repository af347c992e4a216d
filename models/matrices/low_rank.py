"""Low rank: y = U (V x), of two matrices with a few channels between them (Wei et al., arXiv 2406.16450).

Shape suffixes: N tokens, D inputs, R rank.
"""

import dataclasses
import math
from types import MappingProxyType

from torch import Tensor, nn

from models.limits import at_least
from models.matrices.base import Matrix, MatrixConfig
from models.params import Axis, Linear, Normal


@dataclasses.dataclass(frozen=True)
class LowRankConfig(MatrixConfig, kind="low_rank"):
    """rank: channels between the two. Fewer parameters and FLOPs than a dense matrix while rank < D O / (D + O)."""

    rank: int

    example = MappingProxyType({"rank": 6})

    def __post_init__(self) -> None:
        at_least(self, 1, "rank")

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
        return LowRank(d_in, self.rank, d_out, axis, in_axis, init or Normal(0.02), bias)


class LowRank(Matrix):
    """Split outputs split U and leave V whole; split inputs split V, and U, which is whole, makes a part of the sum."""

    def __init__(
        self, d_in: int, rank: int, d_out: int, axis: Axis | None, in_axis: Axis | None, init: Normal, bias: bool
    ) -> None:
        super().__init__()
        # A product of the two has the variance of the dense matrix's elements.
        self.down = Linear(d_in, rank, in_axis=in_axis, init=Normal(1 / math.sqrt(d_in)))
        self.up = Linear(rank, d_out, axis=axis, init=Normal(init.std * math.sqrt(d_in / rank)), wide=False, bias=bias)

    def forward(self, x_ND: Tensor) -> Tensor:
        return self.up(self.down(x_ND))
