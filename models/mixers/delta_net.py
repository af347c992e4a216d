"""DeltaNet: a linear-time mixer whose state is written by the delta rule, without decay.

Shape suffixes: B batch, T sequence, D model width, H heads, K key and value width.
"""

import dataclasses
from types import MappingProxyType
from typing import Self

import torch.nn.functional as F
from torch import Tensor

from models.context import LayerContext
from models.kernels.linear.choice import Recurrence
from models.limits import at_least, head_width
from models.linear import LinearMixer, key_gated, rule_flops, unit
from models.params import Axis, Linear, RMSNorm, upcast
from models.recurrences import Recurrences
from models.slots import Cache, Mixer, MixerConfig
from models.state import Projected, Side, State, Views


@dataclasses.dataclass(frozen=True)
class DeltaNetConfig(MixerConfig, kind="delta_net"):
    """Delta rule with short convolutions and L2-normalised keys (Yang et al., arXiv 2406.06484).

    head_dim: default d_model / num_heads. conv_size: tokens that a convolution sees. output_gate: the output is
    multiplied by SiLU of a projection of the input. allow_neg_eigval: write strength up to 2 (arXiv 2411.12537).

    A gated key scales its token's write strength.
    """

    num_heads: int
    head_dim: int | None = None
    conv_size: int = 4
    output_gate: bool = False
    allow_neg_eigval: bool = False

    key_gate = True
    example = MappingProxyType({"num_heads": 4, "head_dim": 4})

    def __post_init__(self) -> None:
        at_least(self, 1, "num_heads", "head_dim")
        at_least(self, 2, "conv_size", hint=" tokens, and 4 is usual")

    def canonical(self, d_model: int) -> Self:
        return dataclasses.replace(self, head_dim=self.value_shape(d_model)[1])

    def build(self, ctx: LayerContext) -> Mixer:
        return DeltaNet(self, ctx)

    def value_shape(self, d_model: int) -> tuple[int, int]:
        return self.num_heads, head_width(d_model, self.num_heads, self.head_dim)

    def flops_per_token(self, d_model: int, sequence: int) -> float:
        heads, width = self.value_shape(d_model)
        return 6 * self.conv_size * heads * width + rule_flops(width, width, heads, heads, sequence, delta=True)


class DeltaNet(LinearMixer):
    def __init__(self, config: DeltaNetConfig, ctx: LayerContext) -> None:
        super().__init__()
        self.config = config
        heads, self.width = config.value_shape(ctx.d_model)
        axis, inner = Axis("heads", heads), heads * self.width
        self.q = Linear(ctx.d_model, inner, axis=axis)
        self.k = Linear(ctx.d_model, inner, axis=axis)
        self.v = Linear(ctx.d_model, inner, axis=axis)
        self.beta = Linear(ctx.d_model, heads, axis=axis, role="gate")
        self.gate = Linear(ctx.d_model, inner, axis=axis) if config.output_gate else None
        self.o = Linear(inner, ctx.d_model, in_axis=axis, init=ctx.output_init)
        self.norm = RMSNorm(self.width, ctx.norm_eps)
        self.declare_convs({name: (axis, self.width) for name in ("q", "k", "v")}, config.conv_size)
        self.recurrence = Recurrence(delta_key=self.width)

    def project(self, views: Views, inputs: State, side: Side) -> Projected:
        beta_BTH = upcast(self.beta(views.k_BTD)).sigmoid()
        heads = {
            "q": self.q(views.q_BTD).unflatten(-1, (-1, self.width)),
            "k": self.k(views.k_BTD).unflatten(-1, (-1, self.width)),
            "v": self.v(views.v_BTD).unflatten(-1, (-1, self.width)),
            "beta": 2 * beta_BTH if self.config.allow_neg_eigval else beta_BTH,
        }
        return Projected(heads, {} if self.gate is None else {"gate": self.gate(views.q_BTD)})

    def mix(
        self, x: dict[str, Tensor], weights: dict[str, Tensor], past: Cache, rule: Recurrences, positions_BT: Tensor
    ) -> tuple[Tensor, Cache]:
        q, k, beta_BTH = unit(x["q"]), unit(x["k"]), key_gated(x["beta"], x)
        scale = self.width**-0.5
        out_BTHK, state_BHKK = rule(q, k, x["v"], None, beta_BTH, scale=scale, state_BJKV=past.get("state"))
        return out_BTHK, {"state": state_BHKK}

    def merge(self, out_BTHV: Tensor, kept: dict[str, Tensor]) -> Tensor:
        out = self.norm(out_BTHV).flatten(-2)
        return self.o(out * F.silu(kept["gate"]) if "gate" in kept else out)
