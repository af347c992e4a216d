"""What layers at the same place of a repeated block have in common: mixer, FFN, their norms and scalings.

What lies between layers stays every layer's own: the residual, the values, the shortcut, the depth's gates. The shared
modules are built as those of a model that has this one block, so that what links layers (experts that follow the last
router, bounds that rise with depth) links them within it.
"""

import dataclasses
from collections.abc import Callable
from typing import TypeVar

from torch import nn

from models.context import LayerContext
from models.norms.base import Placement
from models.slots import Mixer, MixerConfig

Module = TypeVar("Module", bound=nn.Module)


class Block:
    """The block of `period` layers, at the place that the layer of this context has in it."""

    def __init__(self, ctx: LayerContext, period: int) -> None:
        self.repeats = ctx.num_layers // period
        self.place = dataclasses.replace(
            ctx, index=ctx.index % period, layers=ctx.layers[:period], repeats=self.repeats
        )

    def share(self, role: str, build: Callable[[LayerContext], Module]) -> Module:
        """The module of this role, which the first layer at this place builds."""
        if self.repeats == 1:
            return build(self.place)
        return self.place.share(f"{role} at place {self.place.index} of the block", lambda: build(self.place))

    def mixer(self, config: MixerConfig, own_values: bool) -> Mixer:
        """It keeps its projection of values if the first layer at this place uses it."""

        def build(ctx: LayerContext) -> Mixer:
            mixer = config.build(ctx)
            if not own_values:
                mixer.drop_values()
            return mixer

        return self.share("mixer", build)

    def norms(self, role: str, placement: Placement, views: tuple[bool, ...]) -> Placement:
        """The placement, with the norms of the first one here of the same inputs."""
        first = self.share(f"norms of the {role}'s inputs {views}", lambda ctx: placement)
        assert not list(first.parameters(recurse=False)), "a placement's weights lie in modules that it calls"
        for name, norm in first.named_children():
            setattr(placement, name, norm)
        return placement
