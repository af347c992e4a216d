"""Combinations that are refused, each with its reason and a way out.

Everything else is allowed, and proven by the matrix.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from models.slots import MixerConfig, ResidualConfig, ShortcutConfig, ValuesConfig

if TYPE_CHECKING:
    from models.config import LMConfig


def reasons(config: "LMConfig") -> Iterator[str]:
    """One sentence per broken rule."""
    layers = config.expanded
    if config.shortcut.active and not config.residual.takes_shortcut:
        idle = ShortcutConfig.such_as(lambda kind: not kind.active)
        taking = ResidualConfig.such_as(lambda kind: kind.takes_shortcut)
        yield (
            f"shortcut {config.shortcut.kind} acts on one identity path, which residual {config.residual.kind} does "
            f"not have; use a shortcut that leaves it as it is{idle}, or a residual that has one{taking}"
        )
    if config.depth.mirrors and len(layers) % 2:
        yield (
            f"depth {config.depth.kind} pairs layer l with layer L-1-l, and L = {len(layers)} is odd; "
            f"use {len(layers) + 1} layers"
        )
    if config.depth.gates_keys:
        for index, layer in enumerate(layers):
            if not layer.mixer.key_gate:
                gated = MixerConfig.such_as(lambda kind: kind.key_gate)
                yield (
                    f"depth {config.depth.kind} masks the keys of skipped tokens, which mixer {layer.mixer.kind} "
                    f"(layer {index}) does not define; use a mixer that does{gated}"
                )
    if config.values.crosses_layers:
        shapes = [layer.mixer.value_shape(config.d_model) for layer in layers]
        for index, (heads, width) in enumerate(shapes):
            if (heads, width) != shapes[0]:
                own = ValuesConfig.such_as(lambda kind: not kind.crosses_layers)
                yield (
                    f"values {config.values.kind} takes layer 0's ({shapes[0][0]} heads of width {shapes[0][1]}) "
                    f"to every layer, and layer {index} ({layers[index].mixer.kind}) has {heads} of width {width}; "
                    f"give all layers the same value heads and width, or use values that stay in their layer{own}"
                )


def check(config: "LMConfig") -> None:
    """Raise ValueError with the first broken rule."""
    for reason in reasons(config):
        raise ValueError(reason)
