"""A price on the distance between the gates of all layers and their targets.

Shape suffixes: L layers, G groups.
"""

import dataclasses
from types import MappingProxyType

from torch import Tensor

from models.depth.controllers.base import Levels, Price
from models.depth.controllers.targets import TargetController


@dataclasses.dataclass(frozen=True)
class L2Controller(TargetController, kind="l2"):
    """mean_coef ||mean - target|| + var_coef ||var - target||, norms over layers (the authors' code: 0.1 and 0.1)."""

    mean_coef: float = 0.1
    var_coef: float = 0.1

    example = MappingProxyType({"middle": 0.3})

    def price(self, mean_GL: Tensor, var_GL: Tensor, levels: Levels) -> Price:
        mean_L, var_L = self.targets_of(mean_GL[0])
        mean_coef, var_coef = levels["mean_coef"].mean(), levels["var_coef"].mean()
        return Price(mean_coef * unit(mean_GL - mean_L), var_coef * unit(var_GL - var_L), mean_L, var_L)


def unit(x_GL: Tensor) -> Tensor:
    """x / ||x||, which is the norm's gradient; 0 where x is."""
    norm_G1 = x_GL.norm(dim=-1, keepdim=True)
    return x_GL / norm_G1.where(norm_G1 > 0, 1)
