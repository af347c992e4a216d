"""Branches keep the size they have."""

import dataclasses

from torch import nn

from models.context import LayerContext
from models.slots import ScalingConfig


@dataclasses.dataclass(frozen=True)
class NoScaling(ScalingConfig, kind="none"):
    """No factor on a branch."""

    def build(self, ctx: LayerContext) -> nn.Module:
        return nn.Identity()
