"""Constant prices."""

import dataclasses
from types import MappingProxyType

from models.depth.controllers.base import GateController


@dataclasses.dataclass(frozen=True)
class FixedController(GateController, kind="fixed"):
    """Prices that stay as they are (the paper's sparsity: mean_coef 0.01; with variance: var_coef -0.01 as well)."""

    example = MappingProxyType({"mean_coef": 0.01, "var_coef": -0.01})
