"""The identity path stays the identity."""

import dataclasses

from torch import nn

from models.context import LayerContext
from models.slots import ShortcutConfig


@dataclasses.dataclass(frozen=True)
class NoShortcut(ShortcutConfig, kind="none"):
    """Nothing is added to the identity path."""

    active = False

    def build(self, ctx: LayerContext) -> nn.Module:
        return nn.Identity()
