"""Retention: a matrix per head that decays at a constant rate, each head at its own.

Shape suffixes: B batch, T sequence, D model width, H heads, K key and V value width.
"""

import dataclasses
from types import MappingProxyType
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from models.context import LayerContext
from models.kernels.linear.choice import Recurrence
from models.limits import at_least
from models.linear import LinearMixer, key_gated, rule_flops, whole
from models.params import Axis, Linear, upcast
from models.recurrences import Recurrences
from models.rope import angles, rotate_half
from models.slots import Cache, Mixer, MixerConfig
from models.state import OwnTokens, Projected, Side, State, Views


@dataclasses.dataclass(frozen=True)
class RetentionConfig(MixerConfig, kind="retention"):
    """Multi-scale retention (Sun et al., arXiv 2307.08621): head h keeps 1 - 2^(-5-h) of its state at every token.

    expand_k, expand_v: width of all key heads and of all value heads together, as multiples of d_model. Queries and
    keys are rotated. The normalisers of the paper's parallel form are left out: the norm per head cancels them.

    A gated key scales its token's value.
    """

    num_heads: int = 8
    expand_k: float = 1.0
    expand_v: float = 2.0
    rope_theta: float = 10000.0
    output_gate: bool = True

    key_gate = True
    example = MappingProxyType({"num_heads": 4})

    def __post_init__(self) -> None:
        at_least(self, 1, "num_heads")
        at_least(self, 1, "rope_theta", hint=", and 10000 is usual")

    def build(self, ctx: LayerContext) -> Mixer:
        key = self.key_width(ctx.d_model)
        if key % 2:
            raise ValueError(f"a key head is {key} wide, and pairs are rotated; change d_model, num_heads or expand_k")
        return Retention(self, ctx)

    def canonical(self, d_model: int) -> Self:
        return self

    def key_width(self, d_model: int) -> int:
        return whole("a key head", d_model * self.expand_k / self.num_heads, "d_model, num_heads or expand_k")

    def value_shape(self, d_model: int) -> tuple[int, int]:
        width = whole("a value head", d_model * self.expand_v / self.num_heads, "d_model, num_heads or expand_v")
        return self.num_heads, width

    def flops_per_token(self, d_model: int, sequence: int) -> float:
        heads, value = self.value_shape(d_model)
        return rule_flops(self.key_width(d_model), value, heads, heads, sequence)


class Retention(LinearMixer):
    def __init__(self, config: RetentionConfig, ctx: LayerContext) -> None:
        super().__init__()
        self.config, self.key, self.eps = config, config.key_width(ctx.d_model), ctx.norm_eps
        heads, self.value = config.value_shape(ctx.d_model)
        axis = Axis("heads", heads)
        self.q = Linear(ctx.d_model, heads * self.key, axis=axis)
        self.k = Linear(ctx.d_model, heads * self.key, axis=axis)
        self.v = Linear(ctx.d_model, heads * self.value, axis=axis)
        self.gate = Linear(ctx.d_model, heads * self.value, axis=axis) if config.output_gate else None
        self.o = Linear(heads * self.value, ctx.d_model, in_axis=axis, init=ctx.output_init)
        self.recurrence = Recurrence()

    def own_tokens(self, views: Views, inputs: State, side: Side) -> OwnTokens:
        """The decays of all heads, of which tensor ranks take theirs."""
        dtype = torch.promote_types(views.k_BTD.dtype, torch.float32)
        g_H = log_decays(self.config.num_heads, views.k_BTD.device, dtype)
        return OwnTokens(made_by_head={"g": g_H.expand(*views.k_BTD.shape[:2], -1)})

    def project(self, views: Views, inputs: State, side: Side) -> Projected:
        heads = {
            "q": self.q(views.q_BTD).unflatten(-1, (-1, self.key)),
            "k": self.k(views.k_BTD).unflatten(-1, (-1, self.key)),
            "v": self.v(views.v_BTD).unflatten(-1, (-1, self.value)),
            "g": inputs["g"],
        }
        return Projected(heads, {} if self.gate is None else {"gate": self.gate(views.q_BTD)})

    def mix(
        self, x: dict[str, Tensor], weights: dict[str, Tensor], past: Cache, rule: Recurrences, positions_BT: Tensor
    ) -> tuple[Tensor, Cache]:
        dtype = torch.promote_types(x["q"].dtype, torch.float32)
        cos, sin = angles(positions_BT, self.key, self.config.rope_theta, dtype)
        q, k, v = rotate_half(x["q"], cos, sin), rotate_half(x["k"], cos, sin), key_gated(x["v"], x)
        out_BTHV, state_BHKV = rule(q, k, v, x["g"], scale=self.key**-0.5, state_BJKV=past.get("state"))
        return out_BTHV, {"state": state_BHKV}

    def merge(self, out_BTHV: Tensor, kept: dict[str, Tensor]) -> Tensor:
        out = F.rms_norm(upcast(out_BTHV), out_BTHV.shape[-1:], eps=self.eps).to(out_BTHV.dtype).flatten(-2)
        return self.o(out * F.silu(kept["gate"]) if "gate" in kept else out)


def log_decays(heads: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """log(1 - 2^(-5-h)) for head h."""
    return torch.log1p(-torch.exp2(-5 - torch.arange(heads, device=device, dtype=dtype)))
