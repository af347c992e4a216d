"""Linear attention: softmax's exponential replaced by a product of features.

Shape suffixes: B batch, T sequence, D model width, H heads, K key and value width.
"""

import dataclasses
from types import MappingProxyType
from typing import Literal, Self

import torch.nn.functional as F
from torch import Tensor

from models.context import LayerContext
from models.kernels.linear.choice import Recurrence
from models.limits import above_zero, at_least, head_width
from models.linear import LinearMixer, key_gated, normalized, rule_flops
from models.params import Axis, Linear
from models.recurrences import Recurrences
from models.slots import Cache, Mixer, MixerConfig
from models.state import Projected, Side, State, Views


@dataclasses.dataclass(frozen=True)
class LinearAttentionConfig(MixerConfig, kind="linear_attention"):
    """Linear attention (Katharopoulos et al., arXiv 2006.16236): o_t = sum_s w_ts v_s / (sum_s w_ts + eps) over s <= t,
    with w_ts = phi(q_t) phi(k_s) / sqrt(K).

    head_dim: default d_model / num_heads. feature_map: phi; elu is elu(x) + 1. normalize: divide by the sum of the
    weights.

    A gated key scales its token's weight.
    """

    num_heads: int
    head_dim: int | None = None
    feature_map: Literal["elu", "relu"] = "elu"
    normalize: bool = True
    eps: float = 1e-6

    key_gate = True
    example = MappingProxyType({"num_heads": 4, "head_dim": 4})

    def __post_init__(self) -> None:
        at_least(self, 1, "num_heads", "head_dim")
        above_zero(self, "eps", hint=", since weights may all be 0")

    def canonical(self, d_model: int) -> Self:
        return dataclasses.replace(self, head_dim=self.value_shape(d_model)[1])

    def build(self, ctx: LayerContext) -> Mixer:
        return LinearAttention(self, ctx)

    def value_shape(self, d_model: int) -> tuple[int, int]:
        return self.num_heads, head_width(d_model, self.num_heads, self.head_dim)

    def flops_per_token(self, d_model: int, sequence: int) -> float:
        heads, width = self.value_shape(d_model)
        return rule_flops(width, width + self.normalize, heads, heads, sequence)


class LinearAttention(LinearMixer):
    def __init__(self, config: LinearAttentionConfig, ctx: LayerContext) -> None:
        super().__init__()
        self.config = config
        heads, self.width = config.value_shape(ctx.d_model)
        axis, inner = Axis("heads", heads), heads * self.width
        self.q = Linear(ctx.d_model, inner, axis=axis)
        self.k = Linear(ctx.d_model, inner, axis=axis)
        self.v = Linear(ctx.d_model, inner, axis=axis)
        self.o = Linear(inner, ctx.d_model, in_axis=axis, init=ctx.output_init)
        self.recurrence = Recurrence(wide=config.normalize)

    def project(self, views: Views, inputs: State, side: Side) -> Projected:
        heads = {
            "q": self.q(views.q_BTD).unflatten(-1, (-1, self.width)),
            "k": self.k(views.k_BTD).unflatten(-1, (-1, self.width)),
            "v": self.v(views.v_BTD).unflatten(-1, (-1, self.width)),
        }
        return Projected(heads, {})

    def mix(
        self, x: dict[str, Tensor], weights: dict[str, Tensor], past: Cache, rule: Recurrences, positions_BT: Tensor
    ) -> tuple[Tensor, Cache]:
        q, k = (F.elu(y) + 1 if self.config.feature_map == "elu" else F.relu(y) for y in (x["q"], x["k"]))
        q = q * self.width**-0.5
        if self.config.normalize:
            return normalized(rule, q, k, x["v"], x, past, self.config.eps)
        out_BTHK, state_BHKK = rule(q, k, key_gated(x["v"], x), scale=1.0, state_BJKV=past.get("state"))
        return out_BTHK, {"state": state_BHKK}

    def merge(self, out_BTHV: Tensor, kept: dict[str, Tensor]) -> Tensor:
        return self.o(out_BTHV.flatten(-2))
