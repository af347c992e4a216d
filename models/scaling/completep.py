"""CompleteP and Depth-muP: hyperparameters of a small model hold in a wider and deeper one.

With m_N = d_model / base_width, m_L = layers / base_layers and a = 1 (CompleteP) or 1/2 (Depth-muP):

    branches         x + m_L^-a F(x)
    logits           / m_N;  scores of attention / head_dim, if base_head_dim is given
    wide matrices    standard deviation m_N^-1/2, lr m_L^(a-1) / m_N, weight decay m_N
    all else         lr m_L^(a-1) in layers and 1 in the ends
    eps              m_L^-a / m_N in layers, 1 / m_N in the ends

Shape suffixes: B batch, T sequence, D model width.
"""

import dataclasses
import math
from types import MappingProxyType
from typing import ClassVar

from torch import Tensor, nn

from models.context import LayerContext
from models.limits import above_zero, at_least
from models.params import Factors, Normal, ParamSpec
from models.slots import ScalingConfig


@dataclasses.dataclass(frozen=True)
class CompleteP(ScalingConfig, kind="completep"):
    """CompleteP (Dey et al., arXiv 2505.01618, table 1): the best learning rate depends on neither width nor depth, and
    every layer learns features. A model of base_width and base_layers is what it is without scaling.

    base_width: d_model of the model that the hyperparameters were found with. base_layers: its number of layers.
    base_head_dim: the width of its attention heads; null where larger models have more heads of the same width.
    embedding_scale, logits_scale: factors on the embedding's output and the logits, in models of all sizes.
    """

    base_width: int
    base_layers: int
    base_head_dim: int | None = None
    embedding_scale: float = 1.0
    logits_scale: float = 1.0

    alpha: ClassVar[float] = 1.0
    example = MappingProxyType({"base_width": 8, "base_layers": 2})

    def __post_init__(self) -> None:
        at_least(self, 1, "base_width", "base_layers", "base_head_dim")
        above_zero(self, "embedding_scale", "logits_scale", hint=", and 1 is usual")

    def branch_gain(self, num_layers: int) -> float:
        return (num_layers / self.base_layers) ** -self.alpha

    def build(self, ctx: LayerContext) -> nn.Module:
        return Gain(self.branch_gain(ctx.num_layers))

    def declared(self, spec: ParamSpec, in_layer: bool, d_model: int, num_layers: int) -> ParamSpec:
        width = d_model / self.base_width
        lr = (num_layers / self.base_layers) ** (self.alpha - 1) if in_layer else 1.0
        eps = (self.branch_gain(num_layers) if in_layer else 1.0) / width
        init = spec.init
        # A table of values stands for a projection, whose outputs do not grow with its inputs.
        if isinstance(init, Normal) and (hidden(spec) or (in_layer and spec.role == "embedding")):
            init = Normal(init.std / math.sqrt(width))
        if not hidden(spec):
            return dataclasses.replace(spec, init=init, factors=Factors(lr, 1.0, eps))
        return dataclasses.replace(spec, init=init, factors=Factors(lr / width, width, eps, width))

    def output_gain(self, num_layers: int) -> float:
        """The standard deviation of output matrices is that of the base model's depth."""
        return math.sqrt(num_layers / self.base_layers)

    def embedding_gain(self) -> float:
        return self.embedding_scale

    def logits_gain(self, d_model: int) -> float:
        return self.logits_scale * self.base_width / d_model

    def attention_gain(self, head_dim: int) -> float:
        return 1.0 if self.base_head_dim is None else math.sqrt(self.base_head_dim / head_dim)


@dataclasses.dataclass(frozen=True)
class DepthMuP(CompleteP, kind="depth_mup"):
    """Depth-muP (Yang et al., arXiv 2310.02244): branches shrink with the square root of depth, and so do the learning
    rates in layers. The fields are those of completep."""

    alpha = 0.5


def hidden(spec: ParamSpec) -> bool:
    """Whether a parameter has inputs of which a wider model has more, and is not the head, which the logits' factor
    scales."""
    return spec.wide and spec.role != "head"


class Gain(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, out_BTD: Tensor) -> Tensor:
        return out_BTD * self.factor
