"""Gated slot attention: softmax over a few slots per head, which forget and are written by gates.

Shape suffixes: B batch, T sequence, D model width, H query heads, J key/value heads, M slots, K key and V value width.
"""

import dataclasses
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor

from models.context import LayerContext
from models.head_norm import NormedOutput
from models.kernels.linear.choice import Recurrence, SlotRecurrence
from models.limits import above_zero, at_least
from models.linear import LinearMixer, SharedHeadsConfig, key_gated, rule_flops
from models.params import Axis, Linear, upcast
from models.recurrences import Recurrences, Rule
from models.slots import Cache, Mixer
from models.state import Projected, Side, State, Views


@dataclasses.dataclass(frozen=True)
class GSAConfig(SharedHeadsConfig, kind="gsa"):
    """Gated slot attention (Zhang et al., arXiv 2409.07146).

    num_slots: keys and values that a head keeps. num_kv_heads: keys, values and slots may have fewer heads, each
    serving several query heads. gate_normalizer: log decays are divided by it, so that slots forget slowly at first.

    A gated key scales what its token writes to the slots.
    """

    num_slots: int = 64
    gate_normalizer: float = 8.0

    key_gate = True
    by_rank = False
    example = MappingProxyType({"num_heads": 4, "num_kv_heads": 2, "num_slots": 3})

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "num_slots")
        above_zero(self, "gate_normalizer", hint=", and 8 is usual")

    def build(self, ctx: LayerContext) -> Mixer:
        return GSA(self, ctx)

    def flops_per_token(self, d_model: int, sequence: int) -> float:
        """Of two recurrences with a decay per slot, the first one the other way round."""
        heads, (_, value) = self.num_heads, self.value_shape(d_model)
        widths = (self.key_width(d_model), value)
        return sum(rule_flops(self.num_slots, width, heads, heads, sequence, per_channel=True) for width in widths)


class GSA(LinearMixer):
    states = ("keys", "values")

    def __init__(self, config: GSAConfig, ctx: LayerContext) -> None:
        super().__init__()
        self.config, self.key = config, config.key_width(ctx.d_model)
        heads, (kv_heads, self.value) = config.num_heads, config.value_shape(ctx.d_model)
        axis, kv_axis = Axis("heads", heads), Axis("kv_heads", kv_heads)
        self.q = Linear(ctx.d_model, heads * self.key, axis=axis)
        self.k = Linear(ctx.d_model, kv_heads * self.key, axis=kv_axis)
        self.v = Linear(ctx.d_model, kv_heads * self.value, axis=kv_axis)
        self.forget = Linear(ctx.d_model, kv_heads * config.num_slots, axis=kv_axis, role="gate")
        output = Linear(heads * self.value, ctx.d_model, in_axis=axis, init=ctx.output_init)
        self.o = NormedOutput(heads, self.value, output, ctx.norm_eps)
        self.recurrence, self.slot_recurrence = Recurrence(), SlotRecurrence()

    def project(self, views: Views, inputs: State, side: Side) -> Projected:
        heads = {
            "q": F.silu(self.q(views.q_BTD)).unflatten(-1, (-1, self.key)),
            "k": F.silu(self.k(views.k_BTD)).unflatten(-1, (-1, self.key)),
            "v": self.v(views.v_BTD).unflatten(-1, (-1, self.value)),
            "forget": self.forget(views.k_BTD).unflatten(-1, (-1, self.config.num_slots)),
        }
        return Projected(heads, {})

    def mix(
        self, x: dict[str, Tensor], weights: dict[str, Tensor], past: Cache, rule: Recurrences, positions_BT: Tensor
    ) -> tuple[Tensor, Cache]:
        g = F.logsigmoid(upcast(x["forget"])) / self.config.gate_normalizer
        s = key_gated(-torch.expm1(g), x)
        groups = x["q"].shape[2] // x["k"].shape[2]
        k, v, s, g = (y.repeat_interleave(groups, 2) for y in (x["k"], F.silu(x["v"]), s, g))
        return attend_slots(rule, x["q"], k, v, s, g, past, scale=1.0)

    def merge(self, out_BTHV: Tensor, kept: dict[str, Tensor]) -> Tensor:
        return self.o(F.silu(out_BTHV))

    def finish(self, sum_BTD: Tensor) -> Tensor:
        return self.o.divide(sum_BTD)


def attend_slots(
    rule: Rule,
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    s_BTHM: Tensor,
    g_BTHM: Tensor,
    past: Cache,
    scale: float,
) -> tuple[Tensor, Cache]:
    """softmax over slots of (scale q . slot's key), times slots' values. A token is written to a slot with weight s,
    and what the slot held decays by exp(g).

    Returns ([B, T, H, V], {"keys": [B, H, K, M], "values": [B, H, M, V]}).
    """
    score_BTHM, keys = rule(q_BTHK, k_BTHK, s_BTHM, value_g_BTJV=g_BTHM, scale=scale, state_BJKV=past.get("keys"))
    out, values = rule(score_BTHM.softmax(-1), s_BTHM, v_BTHV, g_BTHM, scale=1.0, state_BJKV=past.get("values"))
    return out, {"keys": keys, "values": values}
