"""HGRN2: a recurrence of matrices whose keys are what its gates forget.

Shape suffixes: B batch, T sequence, D model width, H heads, K key and V value width.
"""

import dataclasses
from types import MappingProxyType
from typing import Self, cast

import torch.nn.functional as F
from torch import Tensor, nn

from models.context import LayerContext
from models.head_norm import NormedOutput
from models.kernels.linear.choice import Recurrence
from models.limits import at_least
from models.linear import LinearMixer, key_gated, rule_flops, whole
from models.lower_bounds import forgetting, share_bounds
from models.params import Axis, Linear
from models.recurrences import Recurrences
from models.slots import Cache, Mixer, MixerConfig
from models.state import Projected, Side, State, Views


@dataclasses.dataclass(frozen=True)
class HGRN2Config(MixerConfig, kind="hgrn2"):
    """HGRN2 (Qin et al., arXiv 2404.07904).

    expand_ratio: width of a key, by which the state is larger than HGRN's. num_heads: default d_model / expand_ratio.
    conv_size: tokens that a convolution on q, the gates and the input sees; null for none. lower_bounds: gates stay
    above a learned bound that grows from layer to layer, from 0 in the first.

    A gated key scales its token's input.
    """

    expand_ratio: int = 128
    num_heads: int | None = None
    conv_size: int | None = None
    lower_bounds: bool = True

    key_gate = True
    by_rank = False
    example = MappingProxyType({"expand_ratio": 4})

    def __post_init__(self) -> None:
        at_least(self, 1, "expand_ratio", "num_heads")
        at_least(self, 2, "conv_size", hint=" tokens, or null for no convolution")

    def canonical(self, d_model: int) -> Self:
        return dataclasses.replace(self, num_heads=self.value_shape(d_model)[0])

    def build(self, ctx: LayerContext) -> Mixer:
        return HGRN2(self, ctx)

    def value_shape(self, d_model: int) -> tuple[int, int]:
        heads = self.num_heads or whole("d_model / expand_ratio", d_model / self.expand_ratio, "one, or give num_heads")
        return heads, whole("a value head", d_model / heads, "d_model or num_heads")

    def flops_per_token(self, d_model: int, sequence: int) -> float:
        heads, value = self.value_shape(d_model)
        conv = 2 * (self.conv_size or 0) * heads * (2 * self.expand_ratio + value)
        return conv + rule_flops(self.expand_ratio, value, heads, heads, sequence, per_channel=True)


class HGRN2(LinearMixer):
    def __init__(self, config: HGRN2Config, ctx: LayerContext) -> None:
        super().__init__()
        heads, self.value = config.value_shape(ctx.d_model)
        self.config, self.key, axis = config, config.expand_ratio, Axis("heads", heads)
        self.q = Linear(ctx.d_model, heads * self.key, axis=axis)
        self.forget = Linear(ctx.d_model, heads * self.key, axis=axis, role="gate")
        self.v = Linear(ctx.d_model, heads * self.value, axis=axis)
        output = Linear(heads * self.value, ctx.d_model, in_axis=axis, init=ctx.output_init)
        self.o = NormedOutput(heads, self.value, output, ctx.norm_eps)
        self.recurrence = Recurrence()
        self.bounds: nn.Module | None = None
        if config.lower_bounds:
            self.bounds, self.nth = share_bounds(ctx, heads, self.key)
        if config.conv_size is not None:
            widths = {"q": (axis, self.key), "forget": (axis, self.key), "v": (axis, self.value)}
            self.declare_convs(widths, config.conv_size)

    def core_weights(self) -> dict[str, Tensor]:
        bounds = {} if self.bounds is None else {"bounds": cast(Tensor, self.bounds(self.nth))}
        return super().core_weights() | bounds

    def project(self, views: Views, inputs: State, side: Side) -> Projected:
        heads = {
            "q": self.q(views.q_BTD).unflatten(-1, (-1, self.key)),
            "forget": self.forget(views.k_BTD).unflatten(-1, (-1, self.key)),
            "v": self.v(views.v_BTD).unflatten(-1, (-1, self.value)),
        }
        return Projected(heads, {})

    def activate(self, x_BTHK: Tensor) -> Tensor:
        return x_BTHK

    def mix(
        self, x: dict[str, Tensor], weights: dict[str, Tensor], past: Cache, rule: Recurrences, positions_BT: Tensor
    ) -> tuple[Tensor, Cache]:
        k, g = forgetting(x["forget"], weights.get("bounds"))
        q, v = F.silu(x["q"]), key_gated(x["v"], x)
        out_BTHV, state_BHKV = rule(q, k, v, g, scale=self.key**-0.5, state_BJKV=past.get("state"))
        return out_BTHV, {"state": state_BHKV}

    def merge(self, out_BTHV: Tensor, kept: dict[str, Tensor]) -> Tensor:
        return self.o(out_BTHV)

    def finish(self, sum_BTD: Tensor) -> Tensor:
        return self.o.divide(sum_BTD)
