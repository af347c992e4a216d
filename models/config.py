"""The model's config: widths, a layer pattern, and one plug-in per slot."""

import dataclasses
import functools
from typing import TypeVar

from torch import nn

from models.context import LayerContext
from models.depth.base import DepthConfig
from models.limits import at_least, check_size
from models.norms.base import NormConfig
from models.plugin import Plugin
from models.slots import FFNConfig, MixerConfig, ResidualConfig, ScalingConfig, ShortcutConfig, ValuesConfig

Slot = TypeVar("Slot", bound=Plugin)
MOST_LAYERS = 4096  # each is a tree of modules: more take minutes to build, and no model has come near


@dataclasses.dataclass(frozen=True)
class LayerConfig:
    """One letter of the pattern."""

    mixer: MixerConfig
    ffn: FFNConfig
    norm: NormConfig | None = None


def default(slot: type[Slot], kind: str) -> Slot:
    return dataclasses.field(default_factory=lambda: slot.of_kind(kind)())


@dataclasses.dataclass(frozen=True)
class LMConfig:
    """A language model.

    pattern: one letter per layer, each a key of `layers`, the whole repeated `repeat` times: "GGGA" x 6 is 24 layers.
    norm: of every layer that names none of its own, and of the embedding and the head.
    """

    vocab_size: int
    d_model: int
    layers: dict[str, LayerConfig]
    pattern: str
    repeat: int = 1
    residual: ResidualConfig = default(ResidualConfig, "plain")
    values: ValuesConfig = default(ValuesConfig, "own")
    norm: NormConfig = default(NormConfig, "pre")
    shortcut: ShortcutConfig = default(ShortcutConfig, "none")
    scaling: ScalingConfig = default(ScalingConfig, "none")
    depth: DepthConfig = default(DepthConfig, "full")
    tie_embeddings: bool = False

    def __post_init__(self) -> None:
        at_least(self, 2, "vocab_size")
        at_least(self, 1, "d_model", "repeat")
        check_size("vocab_size x d_model", self.vocab_size, self.d_model)
        if wrong := [key for key in self.layers if len(key) != 1]:
            raise ValueError(f"layers has the key {wrong[0]!r}; keys are single letters, used in pattern")
        if not self.pattern:
            raise ValueError("pattern is empty; write one letter per layer, such as GGGA")
        if len(self.pattern) * self.repeat > MOST_LAYERS:
            raise ValueError(
                f"pattern of {len(self.pattern)} letters x repeat {self.repeat} is {len(self.pattern) * self.repeat} "
                f"layers; at most {MOST_LAYERS} can be built, so use fewer"
            )
        if missing := [letter for letter in self.pattern if letter not in self.layers]:
            raise ValueError(
                f"pattern {self.pattern!r} uses {missing[0]!r}, which layers does not define; "
                f"layers defines {', '.join(self.layers) or 'nothing'}"
            )
        if unused := [key for key in self.layers if key not in self.pattern]:
            raise ValueError(
                f"layers defines {unused[0]!r}, which pattern {self.pattern!r} never uses; use it, or take it out with "
                f"model.layers.{unused[0]}=null"
            )

    @functools.cached_property
    def expanded(self) -> tuple[LayerConfig, ...]:
        """The config of every layer, in order."""
        return tuple(self.layers[letter] for letter in self.pattern * self.repeat)

    def context(self, index: int, pool: dict[str, nn.Module] | None = None) -> LayerContext:
        """What layer `index` knows of its place. pool: of modules that layers share."""
        layers = self.expanded
        norm = layers[index].norm or self.norm
        return LayerContext(
            self.d_model,
            index,
            layers,
            norm.eps,
            self.residual.output_gain() * self.scaling.output_gain(len(layers)),
            self.vocab_size,
            not self.values.changes,
            self.scaling,
            {} if pool is None else pool,
        )
