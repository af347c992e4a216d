"""Based: linear attention with the second-order Taylor expansion of softmax's exponential.

Shape suffixes: B batch, T sequence, D model width, H heads, F width of a query or key before its expansion, V value
width.
"""

import dataclasses
import math
from types import MappingProxyType
from typing import Self

import torch
from torch import Tensor

from models.context import LayerContext
from models.kernels.linear.choice import Recurrence
from models.limits import at_least, head_width
from models.linear import LinearMixer, normalized, rule_flops
from models.params import Axis, Linear, upcast
from models.recurrences import Recurrences
from models.slots import Cache, Mixer, MixerConfig
from models.state import Projected, Side, State, Views


@dataclasses.dataclass(frozen=True)
class BasedConfig(MixerConfig, kind="based"):
    """Based (Arora et al., arXiv 2402.18668): weights 1 + s + s^2 / 2 with s = q k / sqrt(F), divided by eps plus their
    sum. They are at least 1/2, as (s + 1)^2 / 2 + 1/2.

    feature_dim: F; the state has 1 + F + F^2 rows. head_dim: of a value; default d_model / num_heads.

    A gated key scales its token's weight.
    """

    num_heads: int
    feature_dim: int = 16
    head_dim: int | None = None
    eps: float = 1e-6

    key_gate = True
    example = MappingProxyType({"num_heads": 4, "feature_dim": 2, "head_dim": 4})

    def __post_init__(self) -> None:
        at_least(self, 1, "num_heads", "feature_dim", "head_dim")
        at_least(self, 0, "eps")

    def canonical(self, d_model: int) -> Self:
        return dataclasses.replace(self, head_dim=self.value_shape(d_model)[1])

    def build(self, ctx: LayerContext) -> Mixer:
        return Based(self, ctx)

    def value_shape(self, d_model: int) -> tuple[int, int]:
        return self.num_heads, head_width(d_model, self.num_heads, self.head_dim)

    def flops_per_token(self, d_model: int, sequence: int) -> float:
        heads, value = self.value_shape(d_model)
        features = 1 + self.feature_dim + self.feature_dim**2
        return rule_flops(features, value + 1, heads, heads, sequence)


class Based(LinearMixer):
    def __init__(self, config: BasedConfig, ctx: LayerContext) -> None:
        super().__init__()
        self.config, feature = config, config.feature_dim
        heads, self.value = config.value_shape(ctx.d_model)
        axis = Axis("heads", heads)
        self.q = Linear(ctx.d_model, heads * feature, axis=axis)
        self.k = Linear(ctx.d_model, heads * feature, axis=axis)
        self.v = Linear(ctx.d_model, heads * self.value, axis=axis)
        self.o = Linear(heads * self.value, ctx.d_model, in_axis=axis, init=ctx.output_init)
        self.recurrence = Recurrence(wide=True)

    def project(self, views: Views, inputs: State, side: Side) -> Projected:
        heads = {
            "q": self.q(views.q_BTD).unflatten(-1, (-1, self.config.feature_dim)),
            "k": self.k(views.k_BTD).unflatten(-1, (-1, self.config.feature_dim)),
            "v": self.v(views.v_BTD).unflatten(-1, (-1, self.value)),
        }
        return Projected(heads, {})

    def mix(
        self, x: dict[str, Tensor], weights: dict[str, Tensor], past: Cache, rule: Recurrences, positions_BT: Tensor
    ) -> tuple[Tensor, Cache]:
        scale = self.config.feature_dim**-0.5
        return normalized(rule, taylor(x["q"], scale), taylor(x["k"], scale), x["v"], x, past, self.config.eps)

    def merge(self, out_BTHV: Tensor, kept: dict[str, Tensor]) -> Tensor:
        return self.o(out_BTHV.flatten(-2))


def taylor(x_BTHF: Tensor, scale: float) -> Tensor:
    """[1, x sqrt(scale), x x^T scale / sqrt(2)]: products of two are 1 + s + s^2 / 2 with s = scale x y. At least
    float32."""
    x = upcast(x_BTHF) * math.sqrt(scale)
    square = (x[..., :, None] * x[..., None, :]).flatten(-2) / math.sqrt(2)
    return torch.cat([torch.ones_like(x[..., :1]), x, square], -1)
