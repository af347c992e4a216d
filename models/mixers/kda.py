"""Kimi delta attention: the delta rule with a decay for each key channel.

Shape suffixes: B batch, T sequence, D model width, H key heads, J value heads, K key and V value width.
"""

import dataclasses
from types import MappingProxyType
from typing import Self

import torch.nn.functional as F
from torch import Tensor, nn

from models.context import LayerContext
from models.kernels.linear.choice import Recurrence
from models.limits import at_least
from models.linear import LinearMixer, LogUniform, TimeStepBias, key_gated, refuse_ungrouped, rule_flops, unit, whole
from models.params import Axis, Constant, Linear, RMSNorm, declare, upcast
from models.recurrences import Recurrences
from models.slots import Cache, Mixer, MixerConfig
from models.state import Projected, Side, State, Views


@dataclasses.dataclass(frozen=True)
class KDAConfig(MixerConfig, kind="kda"):
    """Kimi delta attention (Kimi Linear, arXiv 2510.26692).

    num_heads: of queries and keys. num_value_heads: a multiple of it; default the same. expand_v: width of a value
    head, as a multiple of head_dim. gate_rank: of the projections that make decays and output gate; default the width
    of a value head. decay_floor: bounds a token's log decay below by it; null for the unbounded form.
    allow_neg_eigval: write strength up to 2 (arXiv 2411.12537).

    A gated key scales its token's write strength.
    """

    num_heads: int
    head_dim: int
    num_value_heads: int | None = None
    expand_v: float = 1.0
    gate_rank: int | None = None
    conv_size: int = 4
    decay_floor: float | None = None
    allow_neg_eigval: bool = False

    key_gate = True
    example = MappingProxyType({"num_heads": 2, "num_value_heads": 4, "head_dim": 4})

    def __post_init__(self) -> None:
        at_least(self, 1, "num_heads", "num_value_heads", "head_dim", "gate_rank")
        at_least(self, 2, "conv_size", hint=" tokens, and 4 is usual")
        whole("a value head", self.head_dim * self.expand_v, "head_dim or expand_v")
        refuse_ungrouped(self.num_heads, self.num_value_heads)
        if self.decay_floor is not None and self.decay_floor >= 0:
            raise ValueError(f"decay_floor is {self.decay_floor}; log decays are below 0, and -5 is usual")

    def canonical(self, d_model: int) -> Self:
        heads, value = self.value_shape(d_model)
        return dataclasses.replace(self, num_value_heads=heads, gate_rank=self.gate_rank or value)

    def build(self, ctx: LayerContext) -> Mixer:
        return KDA(self, ctx)

    def value_shape(self, d_model: int) -> tuple[int, int]:
        return self.num_value_heads or self.num_heads, int(self.head_dim * self.expand_v)

    def flops_per_token(self, d_model: int, sequence: int) -> float:
        key, (value_heads, value) = self.head_dim, self.value_shape(d_model)
        conv = 2 * self.conv_size * (2 * self.num_heads * key + value_heads * value)
        return conv + rule_flops(key, value, self.num_heads, value_heads, sequence, delta=True, per_channel=True)


class KDA(LinearMixer):
    """Value-sized projections split over "heads", key-sized ones over "kv_heads": key heads may be fewer than ranks."""

    def __init__(self, config: KDAConfig, ctx: LayerContext) -> None:
        super().__init__()
        self.config = config
        heads, key, (value_heads, value) = config.num_heads, config.head_dim, config.value_shape(ctx.d_model)
        self.value, rank = value, config.gate_rank or value
        key_axis, axis = Axis("kv_heads", heads), Axis("heads", value_heads)
        self.q = Linear(ctx.d_model, heads * key, axis=key_axis)
        self.k = Linear(ctx.d_model, heads * key, axis=key_axis)
        self.v = Linear(ctx.d_model, value_heads * value, axis=axis)
        self.beta = Linear(ctx.d_model, value_heads, axis=axis, role="gate")
        self.decay_down = Linear(ctx.d_model, rank, role="gate")
        self.decay_up = Linear(rank, value_heads * key, axis=axis, role="gate", wide=False)
        self.gate_down = Linear(ctx.d_model, rank)
        self.gate_up = Linear(rank, value_heads * value, axis=axis, bias=True, wide=False)
        self.o = Linear(value_heads * value, ctx.d_model, in_axis=axis, init=ctx.output_init)
        self.norm = RMSNorm(value, ctx.norm_eps)
        self.A_log: nn.Parameter
        self.dt_bias: nn.Parameter
        rate = LogUniform(1.0, 16.0) if config.decay_floor is None else Constant(0.0)
        declare(self, "A_log", (value_heads,), rate, (axis,), decay=False)
        declare(self, "dt_bias", (value_heads, key), TimeStepBias(), (axis, None), decay=False)
        self.declare_convs({"q": (key_axis, key), "k": (key_axis, key), "v": (axis, value)}, config.conv_size)
        self.recurrence = Recurrence(delta_key=key)

    def project(self, views: Views, inputs: State, side: Side) -> Projected:
        config, key = self.config, self.config.head_dim
        beta_BTJ = upcast(self.beta(views.k_BTD)).sigmoid()
        step = upcast(self.decay_up(self.decay_down(views.k_BTD))).unflatten(-1, (-1, key)) + upcast(self.dt_bias)
        rate_J1 = upcast(self.A_log).exp()[:, None]
        floor = config.decay_floor
        heads = {
            "q": self.q(views.q_BTD).unflatten(-1, (-1, key)),
            "k": self.k(views.k_BTD).unflatten(-1, (-1, key)),
            "v": self.v(views.v_BTD).unflatten(-1, (-1, self.value)),
            "beta": 2 * beta_BTJ if config.allow_neg_eigval else beta_BTJ,
            "g": -rate_J1 * F.softplus(step) if floor is None else floor * (rate_J1 * step).sigmoid(),
        }
        return Projected(heads, {"gate": self.gate_up(self.gate_down(views.q_BTD))})

    def mix(
        self, x: dict[str, Tensor], weights: dict[str, Tensor], past: Cache, rule: Recurrences, positions_BT: Tensor
    ) -> tuple[Tensor, Cache]:
        q, k, beta_BTJ = unit(x["q"]), unit(x["k"]), key_gated(x["beta"], x)
        scale = q.shape[-1] ** -0.5
        out_BTJV, state_BJKV = rule(q, k, x["v"], x["g"], beta_BTJ, scale=scale, state_BJKV=past.get("state"))
        return out_BTJV, {"state": state_BJKV}

    def merge(self, out_BTHV: Tensor, kept: dict[str, Tensor]) -> Tensor:
        return self.o(self.norm(out_BTHV).flatten(-2) * kept["gate"].sigmoid())
