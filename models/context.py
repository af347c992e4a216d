"""What a plug-in knows of its place in the model when it is built, and how layers come to share a module."""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, TypeVar, cast

from torch import nn

from models.params import Normal, output_std

if TYPE_CHECKING:
    from models.config import LayerConfig
    from models.slots import ScalingConfig

Module = TypeVar("Module", bound=nn.Module)


@dataclasses.dataclass(frozen=True)
class LayerContext:
    """What a plug-in may know about its place: all layers' configs, its own index, the model's width and vocabulary.

    own_values: a mixer mixes the values that it projected. pool: the modules that layers share, by key; see `share`.
    repeats: how often the model runs through these layers.
    """

    d_model: int
    index: int
    layers: tuple["LayerConfig", ...]
    norm_eps: float
    output_gain: float = 1.0
    vocab_size: int = 0
    own_values: bool = True
    scaling: "ScalingConfig | None" = None
    pool: dict[str, nn.Module] = dataclasses.field(default_factory=dict, repr=False, compare=False)
    repeats: int = 1

    def sublayer(self, branch: Literal["mixer", "ffn"]) -> int:
        """The number of this layer's branch among those of all layers, mixer and FFN in turn."""
        return 2 * self.index + (branch == "ffn")

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    def share(self, key: str, build: Callable[[], Module]) -> Module:
        """The model's one module of this key, built by the first layer that asks for it.

        Its parameters are one group: pipeline stages hold a copy each, gradients are summed over all uses, and the
        first layer's name is the one that is saved. The module must be called (FSDP gathers its parameters then).
        """
        if key not in self.pool:
            self.pool[key] = build()
        return cast(Module, self.pool[key])

    def attention_gain(self, head_dim: int) -> float:
        """Factor on the scores of softmax attention over heads of this width, beside 1 / sqrt(head_dim)."""
        return 1.0 if self.scaling is None else self.scaling.attention_gain(head_dim)

    @property
    def output_init(self) -> Normal:
        """Initialisation of a branch's last matrix."""
        return output_std(self.num_layers * self.repeats, self.output_gain)
