"""Gated linear attention: a matrix per head that forgets each key channel by a gate of its own.

Shape suffixes: B batch, T sequence, D model width, H query heads, J key/value heads, K key and V value width.
"""

import dataclasses
from types import MappingProxyType

import torch.nn.functional as F
from torch import Tensor

from models.context import LayerContext
from models.kernels.linear.choice import Recurrence
from models.limits import above_zero, at_least
from models.linear import LinearMixer, SharedHeadsConfig, key_gated, rule_flops
from models.params import Axis, Linear, RMSNorm, upcast
from models.recurrences import Recurrences
from models.slots import Cache, Mixer
from models.state import Projected, Side, State, Views


@dataclasses.dataclass(frozen=True)
class GLAConfig(SharedHeadsConfig, kind="gla"):
    """Gated linear attention (Yang et al., arXiv 2312.06635).

    num_kv_heads: keys, values and decays may have fewer heads, each serving several query heads. gate_rank: of the
    decays' projection. gate_normalizer: log decays are divided by it, so that a state forgets slowly at first.
    gate_floor: least log decay. conv_size: tokens that a convolution on q, k and v sees; null for none.

    A gated key scales its token's value.
    """

    expand_k: float = 0.5
    gate_rank: int = 16
    gate_normalizer: float = 16.0
    gate_floor: float | None = None
    conv_size: int | None = None
    output_gate: bool = True

    key_gate = True
    example = MappingProxyType({"num_heads": 4, "num_kv_heads": 2, "expand_k": 1.0, "gate_rank": 3})

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "gate_rank")
        at_least(self, 2, "conv_size", hint=" tokens, or null for no convolution")
        above_zero(self, "gate_normalizer", hint=", and 16 is usual")
        if self.gate_floor is not None and self.gate_floor >= 0:
            raise ValueError(f"gate_floor is {self.gate_floor}; log decays are below 0, so give less, or null for none")

    def build(self, ctx: LayerContext) -> Mixer:
        return GLA(self, ctx)

    def flops_per_token(self, d_model: int, sequence: int) -> float:
        heads, key, (kv_heads, value) = self.num_heads, self.key_width(d_model), self.value_shape(d_model)
        conv = 2 * (self.conv_size or 0) * (heads * key + kv_heads * (key + value))
        return conv + rule_flops(key, value, heads, heads, sequence, per_channel=True)


class GLA(LinearMixer):
    def __init__(self, config: GLAConfig, ctx: LayerContext) -> None:
        super().__init__()
        self.config, self.key = config, config.key_width(ctx.d_model)
        heads, (kv_heads, self.value) = config.num_heads, config.value_shape(ctx.d_model)
        axis, kv_axis = Axis("heads", heads), Axis("kv_heads", kv_heads)
        self.q = Linear(ctx.d_model, heads * self.key, axis=axis)
        self.k = Linear(ctx.d_model, kv_heads * self.key, axis=kv_axis)
        self.v = Linear(ctx.d_model, kv_heads * self.value, axis=kv_axis)
        self.decay_down = Linear(ctx.d_model, config.gate_rank, role="gate")
        self.decay_up = Linear(config.gate_rank, kv_heads * self.key, axis=kv_axis, bias=True, role="gate", wide=False)
        self.gate = Linear(ctx.d_model, heads * self.value, axis=axis) if config.output_gate else None
        self.o = Linear(heads * self.value, ctx.d_model, in_axis=axis, init=ctx.output_init)
        self.norm = RMSNorm(self.value, ctx.norm_eps)
        self.recurrence = Recurrence()
        if config.conv_size is not None:
            widths = {"q": (axis, self.key), "k": (kv_axis, self.key), "v": (kv_axis, self.value)}
            self.declare_convs(widths, config.conv_size)

    def project(self, views: Views, inputs: State, side: Side) -> Projected:
        config = self.config
        gate = upcast(self.decay_up(self.decay_down(views.k_BTD)))
        g = F.logsigmoid(gate) / config.gate_normalizer
        heads = {
            "q": self.q(views.q_BTD).unflatten(-1, (-1, self.key)),
            "k": self.k(views.k_BTD).unflatten(-1, (-1, self.key)),
            "v": self.v(views.v_BTD).unflatten(-1, (-1, self.value)),
            "g": (g if config.gate_floor is None else g.clamp_min(config.gate_floor)).unflatten(-1, (-1, self.key)),
        }
        return Projected(heads, {} if self.gate is None else {"gate": self.gate(views.q_BTD)})

    def mix(
        self, x: dict[str, Tensor], weights: dict[str, Tensor], past: Cache, rule: Recurrences, positions_BT: Tensor
    ) -> tuple[Tensor, Cache]:
        groups = x["q"].shape[2] // x["k"].shape[2]
        k, v, g = (y.repeat_interleave(groups, 2) for y in (x["k"], key_gated(x["v"], x), x["g"]))
        out_BTHV, state_BHKV = rule(x["q"], k, v, g, scale=self.key**-0.5, state_BJKV=past.get("state"))
        return out_BTHV, {"state": state_BHKV}

    def merge(self, out_BTHV: Tensor, kept: dict[str, Tensor]) -> Tensor:
        out = self.norm(out_BTHV).flatten(-2)
        return self.o(out * F.silu(kept["gate"]) if "gate" in kept else out)
