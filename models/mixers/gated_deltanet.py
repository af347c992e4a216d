"""Gated DeltaNet: a linear-time mixer whose state is written by the gated delta rule.

Shape suffixes: B batch, T sequence, D model width, H key heads, J value heads, K key width, V value width.
"""

import dataclasses
from types import MappingProxyType
from typing import Self

import torch.nn.functional as F
from torch import Tensor, nn

from models.context import LayerContext
from models.kernels.linear.choice import Recurrence
from models.limits import at_least
from models.linear import LinearMixer, LogUniform, TimeStepBias, key_gated, refuse_ungrouped, rule_flops, unit
from models.params import Axis, Linear, RMSNorm, declare, upcast
from models.recurrences import Recurrences
from models.slots import Cache, Mixer, MixerConfig
from models.state import Projected, Side, State, Views


@dataclasses.dataclass(frozen=True)
class GatedDeltaNetConfig(MixerConfig, kind="gated_deltanet"):
    """Gated delta rule with short convolutions and L2-normalised keys (Yang et al., arXiv 2412.06464).

    num_heads: of queries and keys. num_value_heads: a multiple of it; default the same. head_dim: width of a query or
    key; expand_v: of a value, as a multiple of it. conv_size: tokens that a convolution sees. output_gate: the output
    is multiplied by SiLU of a projection of the input. allow_neg_eigval: write strength up to 2, so that a write can
    flip a direction of the state (arXiv 2411.12537).

    A gated key scales its token's write strength: a skipped token writes and erases nothing. (Keys have unit length, so
    a factor on the key itself would have no meaning of its own.)
    """

    num_heads: int
    head_dim: int
    num_value_heads: int | None = None
    expand_v: float = 2.0
    conv_size: int = 4
    conv_bias: bool = False
    output_gate: bool = True
    allow_neg_eigval: bool = False

    key_gate = True
    example = MappingProxyType({"num_heads": 2, "num_value_heads": 4, "head_dim": 4, "expand_v": 1.0})

    def __post_init__(self) -> None:
        at_least(self, 1, "num_heads", "num_value_heads", "head_dim")
        at_least(self, 2, "conv_size", hint=" tokens, and 4 is usual")
        refuse_ungrouped(self.num_heads, self.num_value_heads)
        if not (self.head_dim * self.expand_v).is_integer() or self.expand_v <= 0:
            raise ValueError(
                f"head_dim {self.head_dim} x expand_v {self.expand_v} is {self.head_dim * self.expand_v}; "
                "a value head needs a whole, positive width, so change one of them"
            )

    def canonical(self, d_model: int) -> Self:
        return dataclasses.replace(self, num_value_heads=self.value_shape(d_model)[0])

    def build(self, ctx: LayerContext) -> Mixer:
        return GatedDeltaNet(self, ctx)

    def value_shape(self, d_model: int) -> tuple[int, int]:
        return self.num_value_heads or self.num_heads, int(self.head_dim * self.expand_v)

    def flops_per_token(self, d_model: int, sequence: int) -> float:
        key, (value_heads, value) = self.head_dim, self.value_shape(d_model)
        conv = 2 * self.conv_size * (2 * self.num_heads * key + value_heads * value)
        return conv + rule_flops(key, value, self.num_heads, value_heads, sequence, delta=True)


class GatedDeltaNet(LinearMixer):
    """Value-sized projections split over "heads", key-sized ones over "kv_heads": key heads may be fewer than ranks."""

    def __init__(self, config: GatedDeltaNetConfig, ctx: LayerContext) -> None:
        super().__init__()
        self.config = config
        heads, key, (value_heads, value) = config.num_heads, config.head_dim, config.value_shape(ctx.d_model)
        self.value_width = value
        key_axis, axis = Axis("kv_heads", heads), Axis("heads", value_heads)
        self.q = Linear(ctx.d_model, heads * key, axis=key_axis)
        self.k = Linear(ctx.d_model, heads * key, axis=key_axis)
        self.v = Linear(ctx.d_model, value_heads * value, axis=axis)
        self.beta = Linear(ctx.d_model, value_heads, axis=axis, role="gate")
        self.decay = Linear(ctx.d_model, value_heads, axis=axis, role="gate")
        self.gate = Linear(ctx.d_model, value_heads * value, axis=axis) if config.output_gate else None
        self.o = Linear(value_heads * value, ctx.d_model, in_axis=axis, init=ctx.output_init)
        self.norm = RMSNorm(value, ctx.norm_eps)
        self.A_log: nn.Parameter
        self.dt_bias: nn.Parameter
        declare(self, "A_log", (value_heads,), LogUniform(0.0, 16.0), (axis,), decay=False)
        declare(self, "dt_bias", (value_heads,), TimeStepBias(), (axis,), decay=False)
        convs = {"q": (key_axis, key), "k": (key_axis, key), "v": (axis, value)}
        self.declare_convs(convs, config.conv_size, config.conv_bias)
        self.recurrence = Recurrence(delta_key=key)

    def project(self, views: Views, inputs: State, side: Side) -> Projected:
        key, value = self.config.head_dim, self.value_width
        beta_BTJ = upcast(self.beta(views.k_BTD)).sigmoid()
        step_BTJ = F.softplus(upcast(self.decay(views.k_BTD)) + upcast(self.dt_bias))
        heads = {
            "q": self.q(views.q_BTD).unflatten(-1, (-1, key)),
            "k": self.k(views.k_BTD).unflatten(-1, (-1, key)),
            "v": self.v(views.v_BTD).unflatten(-1, (-1, value)),
            "beta": 2 * beta_BTJ if self.config.allow_neg_eigval else beta_BTJ,
            "g": -upcast(self.A_log).exp() * step_BTJ,
        }
        return Projected(heads, {} if self.gate is None else {"gate": self.gate(views.q_BTD)})

    def mix(
        self, x: dict[str, Tensor], weights: dict[str, Tensor], past: Cache, rule: Recurrences, positions_BT: Tensor
    ) -> tuple[Tensor, Cache]:
        q, k, beta_BTJ = unit(x["q"]), unit(x["k"]), key_gated(x["beta"], x)
        scale = q.shape[-1] ** -0.5
        out_BTJV, state_BJKV = rule(q, k, x["v"], x["g"], beta_BTJ, scale=scale, state_BJKV=past.get("state"))
        return out_BTJV, {"state": state_BJKV}

    def merge(self, out_BTHV: Tensor, kept: dict[str, Tensor]) -> Tensor:
        out = self.norm(out_BTHV).flatten(-2)
        if "gate" in kept:
            out = out * F.silu(kept["gate"])
        return self.o(out)
