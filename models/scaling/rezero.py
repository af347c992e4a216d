"""ReZero: a branch is multiplied by a learned number that starts at 0 (Bachlechner et al., arXiv 2003.04887).

Shape suffixes: B batch, T sequence, D model width.
"""

import dataclasses

from torch import Tensor, nn

from models.context import LayerContext
from models.params import Constant, declare
from models.slots import ScalingConfig


@dataclasses.dataclass(frozen=True)
class ReZero(ScalingConfig, kind="rezero"):
    """x + alpha F(x), one alpha per sublayer, without weight decay. The model starts as the identity."""

    def build(self, ctx: LayerContext) -> nn.Module:
        return Alpha()


class Alpha(nn.Module):
    alpha: nn.Parameter

    def __init__(self) -> None:
        super().__init__()
        declare(self, "alpha", (1,), Constant(0.0))

    def forward(self, out_BTD: Tensor) -> Tensor:
        return out_BTD * self.alpha
