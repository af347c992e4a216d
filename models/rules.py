"""Combinations that are refused, each with its reason and a way out. Everything else is allowed, and proven by the matrix."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from models.config import LMConfig


def reasons(config: "LMConfig") -> Iterator[str]:
    """One sentence per broken rule."""
    layers = config.expanded
    if config.shortcut.kind != "none" and not config.residual.takes_shortcut:
        yield (
            f"shortcut {config.shortcut.kind} acts on one identity path, which residual {config.residual.kind} does not "
            "have; use shortcut none, or a residual that has one, such as plain or ladder"
        )
    if config.depth.kind == "skip_middle":
        if len(layers) % 2:
            raise_to = len(layers) + 1
            yield f"depth skip_middle mirrors the layers and {len(layers)} is odd; use {len(layers) - 1} or {raise_to} layers"
        for index, layer in enumerate(layers):
            if not layer.mixer.key_gate:
                yield (
                    f"depth skip_middle masks the keys of skipped tokens, which mixer {layer.mixer.kind} (layer {index}) "
                    "does not define; use a mixer that does, such as attention or gated_deltanet"
                )


def check(config: "LMConfig") -> None:
    """Raise ValueError with the first broken rule."""
    for reason in reasons(config):
        raise ValueError(reason)
