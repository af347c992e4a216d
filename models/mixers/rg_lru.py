"""RG-LRU: Griffin's recurrent block, a gated recurrence of vectors behind a short convolution.

Shape suffixes: B batch, T sequence, D model width, H heads (blocks of channels that share gates), V width of a head.
"""

import dataclasses
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.context import LayerContext
from models.limits import at_least
from models.linear import LinearMixer, key_gated, whole
from models.params import Axis, Constant, Linear, Normal, declare, upcast
from models.recurrences import Recurrences
from models.slots import Cache, Mixer, MixerConfig
from models.state import Projected, Side, State, Views

# What the gate of the recurrence is multiplied by, and the bound on the derivative of the input's scale: the paper's.
SHARPNESS = 8.0
STEEPEST = 1000.0


@dataclasses.dataclass(frozen=True)
class RGLRUConfig(MixerConfig, kind="rg_lru"):
    """Real-gated linear recurrent unit (De et al., arXiv 2402.19427).

    num_heads: blocks of the gates' block-diagonal matrices. expand: width of the recurrence, as a multiple of d_model.
    conv_size: tokens that the convolution sees.

    A gated key scales what its token writes; its decay stays.
    """

    num_heads: int
    expand: float = 1.0
    conv_size: int = 4

    key_gate = True
    example = MappingProxyType({"num_heads": 4})

    def __post_init__(self) -> None:
        at_least(self, 1, "num_heads")
        at_least(self, 2, "conv_size", hint=" tokens, and 4 is usual")

    def build(self, ctx: LayerContext) -> Mixer:
        return RGLRU(self, ctx)

    def value_shape(self, d_model: int) -> tuple[int, int]:
        width = whole("a head", d_model * self.expand / self.num_heads, "d_model, num_heads or expand")
        return self.num_heads, width

    def flops_per_token(self, d_model: int, sequence: int) -> float:
        """The convolution, two gates, and the recurrence."""
        heads, width = self.value_shape(d_model)
        return heads * width * (2 * self.conv_size + 4 * width + 3)


@dataclasses.dataclass(frozen=True)
class Radius:
    """The L for which exp(-softplus(L)), a channel's least decay to the power 1/8, has a uniform square within
    [0.9^2, 0.999^2]."""

    def __call__(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        square = 0.9**2 + (0.999**2 - 0.9**2) * torch.rand(shape, generator=generator)
        return torch.expm1(-0.5 * square.log()).log()


class RGLRU(LinearMixer):
    views = ("q", "v")

    def __init__(self, config: RGLRUConfig, ctx: LayerContext) -> None:
        super().__init__()
        self.config = config
        heads, self.width = config.value_shape(ctx.d_model)
        axis, inner = Axis("heads", heads), heads * self.width
        self.v = Linear(ctx.d_model, inner, axis=axis)
        self.gate = Linear(ctx.d_model, inner, axis=axis)
        self.o = Linear(inner, ctx.d_model, in_axis=axis, init=ctx.output_init)
        self.decay: nn.Parameter
        declare(self, "decay", (heads, self.width), Radius(), (axis, None), decay=False)
        for name in ("input", "recurrent"):
            matrix = (heads, self.width, self.width)
            declare(self, f"{name}_gate", matrix, Normal(self.width**-0.5), (axis, None, None), role="gate", wide=False)
            declare(self, f"{name}_bias", matrix[:2], Constant(0.0), (axis, None), decay=False)
        self.declare_convs({"v": (axis, self.width)}, config.conv_size, bias=True)

    def core_weights(self) -> dict[str, Tensor]:
        names = ("decay", "input_gate", "input_bias", "recurrent_gate", "recurrent_bias")
        return super().core_weights() | {name: getattr(self, name) for name in names}

    def project(self, views: Views, inputs: State, side: Side) -> Projected:
        return Projected({"v": self.v(views.v_BTD).unflatten(-1, (-1, self.width))}, {"gate": self.gate(views.q_BTD)})

    def activate(self, x_BTHK: Tensor) -> Tensor:
        return x_BTHK

    def mix(
        self, x: dict[str, Tensor], weights: dict[str, Tensor], past: Cache, rule: Recurrences, positions_BT: Tensor
    ) -> tuple[Tensor, Cache]:
        v_BTHV = upcast(x["v"])
        decay, written = gates(v_BTHV, weights, rule.starts(v_BTHV))
        out_BTHV, state_BHV = rule.scan(decay, key_gated(written, x), past.get("state"))
        return out_BTHV.to(x["v"].dtype), {"state": state_BHV}

    def merge(self, out_BTHV: Tensor, kept: dict[str, Tensor]) -> Tensor:
        return self.o(out_BTHV.flatten(-2) * F.gelu(kept["gate"], approximate="tanh"))


def gates(x_BTHV: Tensor, weights: dict[str, Tensor], starts_BT: Tensor) -> tuple[Tensor, Tensor]:
    """(a, input), each [B, T, H, V]: a = exp(-8 r softplus(decay)) and input = sqrt(1 - a^2) i x, r and i the token's
    gates. A document's first token has no state to make room for: a is 0 there."""
    r, i = (
        (
            torch.einsum("bthv,hvw->bthw", x_BTHV, upcast(weights[f"{name}_gate"])) + upcast(weights[f"{name}_bias"])
        ).sigmoid()
        for name in ("recurrent", "input")
    )
    log_decay = -SHARPNESS * r * F.softplus(upcast(weights["decay"]))
    first = starts_BT[..., None, None]
    room = _Sqrt.apply(-torch.expm1(2 * log_decay)).where(~first, 1)
    return log_decay.exp().where(~first, 0), room * i * x_BTHV


class _Sqrt(torch.autograd.Function):
    """The square root, whose derivative is bounded: it is infinite where nothing decays."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sqrt()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return grad / (4 * x).clamp_min(STEEPEST**-2).sqrt()
