"""HGRN: a gated recurrence of vectors, whose gates forget less in deeper layers.

Shape suffixes: B batch, T sequence, D model width, H heads (groups of channels), V width of a head.
"""

import dataclasses
from types import MappingProxyType
from typing import Self, cast

import torch.nn.functional as F
from torch import Tensor, nn

from models.context import LayerContext
from models.head_norm import NormedOutput
from models.limits import at_least
from models.linear import LinearMixer, key_gated, whole
from models.lower_bounds import forgetting, share_bounds
from models.params import Axis, Linear
from models.recurrences import Recurrences
from models.slots import Cache, Mixer, MixerConfig
from models.state import Projected, Side, State, Views


@dataclasses.dataclass(frozen=True)
class HGRNConfig(MixerConfig, kind="hgrn"):
    """HGRN (Qin et al., arXiv 2311.04823), with real gates as in its authors' language models.

    expand: width of the recurrence, as a multiple of d_model. num_heads: groups of channels that ranks may have;
    nothing is computed from it, and by default every channel is one. conv_size: tokens that a convolution on gates and
    input sees; null for none. lower_bounds: gates stay above a learned bound that grows from layer to layer, from 0 in
    the first.

    A gated key scales what its token writes; its decay stays.
    """

    expand: float = 1.0
    num_heads: int | None = None
    conv_size: int | None = None
    lower_bounds: bool = True

    key_gate = True
    by_rank = False
    example = MappingProxyType({"num_heads": 4})

    def __post_init__(self) -> None:
        at_least(self, 1, "num_heads")
        at_least(self, 2, "conv_size", hint=" tokens, or null for no convolution")

    def canonical(self, d_model: int) -> Self:
        return dataclasses.replace(self, num_heads=self.value_shape(d_model)[0])

    def build(self, ctx: LayerContext) -> Mixer:
        return HGRN(self, ctx)

    def value_shape(self, d_model: int) -> tuple[int, int]:
        width = whole("the recurrence", d_model * self.expand, "d_model or expand")
        heads = self.num_heads or width
        return heads, whole("a head", width / heads, "d_model, num_heads or expand")

    def flops_per_token(self, d_model: int, sequence: int) -> float:
        """The convolutions, the input's gate, and the recurrence."""
        heads, width = self.value_shape(d_model)
        return heads * width * (4 * (self.conv_size or 0) + 3)


class HGRN(LinearMixer):
    def __init__(self, config: HGRNConfig, ctx: LayerContext) -> None:
        super().__init__()
        heads, self.width = config.value_shape(ctx.d_model)
        axis, inner = Axis("heads", heads), heads * self.width
        self.v = Linear(ctx.d_model, inner, axis=axis)
        self.forget = Linear(ctx.d_model, inner, axis=axis, role="gate")
        self.gate = Linear(ctx.d_model, inner, axis=axis)
        output = Linear(inner, ctx.d_model, in_axis=axis, init=ctx.output_init)
        self.o = NormedOutput(heads, self.width, output, ctx.norm_eps)
        self.bounds: nn.Module | None = None
        if config.lower_bounds:
            self.bounds, self.nth = share_bounds(ctx, heads, self.width)
        if config.conv_size is not None:
            self.declare_convs({"v": (axis, self.width), "forget": (axis, self.width)}, config.conv_size)

    def core_weights(self) -> dict[str, Tensor]:
        bounds = {} if self.bounds is None else {"bounds": cast(Tensor, self.bounds(self.nth))}
        return super().core_weights() | bounds

    def project(self, views: Views, inputs: State, side: Side) -> Projected:
        heads = {
            "v": self.v(views.v_BTD).unflatten(-1, (-1, self.width)),
            "forget": self.forget(views.k_BTD).unflatten(-1, (-1, self.width)),
        }
        return Projected(heads, {"gate": self.gate(views.q_BTD).unflatten(-1, (-1, self.width))})

    def activate(self, x_BTHK: Tensor) -> Tensor:
        return x_BTHK

    def mix(
        self, x: dict[str, Tensor], weights: dict[str, Tensor], past: Cache, rule: Recurrences, positions_BT: Tensor
    ) -> tuple[Tensor, Cache]:
        room, log_decay = forgetting(x["forget"], weights.get("bounds"))
        written = key_gated(F.silu(x["v"]) * room, x)
        out_BTHV, state_BHV = rule.scan(log_decay.exp(), written, past.get("state"))
        return out_BTHV.to(x["v"].dtype), {"state": state_BHV}

    def merge(self, out_BTHV: Tensor, kept: dict[str, Tensor]) -> Tensor:
        return self.o(out_BTHV, F.silu(kept["gate"]))

    def finish(self, sum_BTD: Tensor) -> Tensor:
        return self.o.divide(sum_BTD)
