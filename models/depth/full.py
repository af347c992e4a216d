"""Every layer runs for every token."""

import dataclasses

from models.context import LayerContext
from models.depth.base import DepthConfig, DepthControl


@dataclasses.dataclass(frozen=True)
class FullDepth(DepthConfig, kind="full"):
    """No gates."""

    def build(self, ctx: LayerContext) -> DepthControl:
        return Full()


class Full(DepthControl):
    peeks = False
