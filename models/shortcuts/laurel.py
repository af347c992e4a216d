"""LAuReL, low-rank form: the identity path becomes x + B A x.

Shape suffixes: B batch, T sequence, D model width.
"""

import dataclasses

from torch import Tensor, nn

from models.context import LayerContext
from models.limits import at_least
from models.params import Constant, FanIn, Linear
from models.slots import ShortcutConfig


@dataclasses.dataclass(frozen=True)
class Laurel(ShortcutConfig, kind="laurel"):
    """LAuReL-LR (Menghani et al., arXiv 2411.07501): A is rank x D, B is D x rank and starts at 0, so that the path
    starts as the identity."""

    rank: int = 32

    def __post_init__(self) -> None:
        at_least(self, 1, "rank")

    def build(self, ctx: LayerContext) -> nn.Module:
        return LowRank(ctx.d_model, self.rank)


class LowRank(nn.Module):
    def __init__(self, d_model: int, rank: int) -> None:
        super().__init__()
        self.down = Linear(d_model, rank, init=FanIn(d_model))
        self.up = Linear(rank, d_model, init=Constant(0.0), wide=False)

    def low(self, x_BTD: Tensor) -> Tensor:
        """B A x."""
        return self.up(self.down(x_BTD))

    def forward(self, x_BTD: Tensor) -> Tensor:
        return x_BTD + self.low(x_BTD)
