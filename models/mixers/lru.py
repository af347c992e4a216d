"""LRU: a recurrence of complex vectors, whose eigenvalues start on a ring and depend on no token.

Shape suffixes: B batch, T sequence, D model width, H heads (groups of states), S states of a head, V = 2 S: real and
imaginary part of a state, next to each other.
"""

import dataclasses
import math
from types import MappingProxyType
from typing import Self

import torch
from torch import Tensor, nn

from models.context import LayerContext
from models.limits import above_zero, at_least
from models.linear import LinearMixer, key_gated, whole
from models.params import Axis, FanIn, Linear, declare, upcast
from models.recurrences import Recurrences
from models.slots import Cache, Mixer, MixerConfig
from models.state import Projected, Side, State, Views


@dataclasses.dataclass(frozen=True)
class LRUConfig(MixerConfig, kind="lru"):
    """Linear recurrent unit (Orvieto et al., arXiv 2303.06349), without the gated linear unit behind it: the FFN slot
    holds one.

    num_states: complex ones; default d_model. num_heads: groups of states that ranks may have; nothing is computed from
    it, and by default every state is one. r_min, r_max: eigenvalues start with absolute values between them, uniform in
    area. max_phase: and with angles from 0 to it.

    A gated key scales what its token writes.
    """

    num_states: int | None = None
    num_heads: int | None = None
    r_min: float = 0.9
    r_max: float = 0.999
    max_phase: float = 2 * math.pi

    key_gate = True
    example = MappingProxyType({"num_heads": 4})

    def __post_init__(self) -> None:
        at_least(self, 1, "num_states", "num_heads")
        above_zero(self, "max_phase", hint=", and 6.28 is usual")
        if not 0 <= self.r_min < self.r_max < 1:
            raise ValueError(
                f"r_min is {self.r_min} and r_max {self.r_max}; eigenvalues need 0 <= r_min < r_max < 1, such as 0.9 "
                "and 0.999"
            )

    def canonical(self, d_model: int) -> Self:
        heads, width = self.value_shape(d_model)
        return dataclasses.replace(self, num_heads=heads, num_states=heads * width // 2)

    def build(self, ctx: LayerContext) -> Mixer:
        return LRU(self, ctx)

    def value_shape(self, d_model: int) -> tuple[int, int]:
        states = self.num_states or d_model
        heads = self.num_heads or states
        return heads, 2 * whole("a head", states / heads, "num_states, d_model or num_heads")

    def flops_per_token(self, d_model: int, sequence: int) -> float:
        """A state's scaling, turn and sum."""
        heads, width = self.value_shape(d_model)
        return 5 * heads * width


@dataclasses.dataclass(frozen=True)
class Ring:
    """(log -log |lambda|, log angle, log sqrt(1 - |lambda|^2)) of eigenvalues that are uniform on a ring. The last is
    the scale of the input at which a state of white noise has variance 1."""

    r_min: float
    r_max: float
    max_phase: float

    def __call__(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        area, turn = (1 - torch.rand(shape[:-1], generator=generator) for _ in range(2))
        square = self.r_min**2 + (self.r_max**2 - self.r_min**2) * area
        return torch.stack([(-0.5 * square.log()).log(), (self.max_phase * turn).log(), 0.5 * (-square).log1p()], -1)


class LRU(LinearMixer):
    views = ("v",)
    value_views = ()  # the skip reads it too

    def __init__(self, config: LRUConfig, ctx: LayerContext) -> None:
        super().__init__()
        self.heads, self.width = config.value_shape(ctx.d_model)
        axis, inner = Axis("heads", self.heads), self.heads * self.width
        self.v = Linear(ctx.d_model, inner, axis=axis, init=FanIn(2 * ctx.d_model))
        self.o = Linear(inner, ctx.d_model, in_axis=axis, init=ctx.output_init)
        self.ring: nn.Parameter
        self.skip: nn.Parameter
        ring = Ring(config.r_min, config.r_max, config.max_phase)
        declare(self, "ring", (self.heads, self.width // 2, 3), ring, (axis, None, None), decay=False)
        declare(self, "skip", (ctx.d_model,), ctx.output_init)

    def core_weights(self) -> dict[str, Tensor]:
        return {"ring": self.ring}

    def project(self, views: Views, inputs: State, side: Side) -> Projected:
        v_BTHV = self.v(views.v_BTD).unflatten(-1, (-1, self.width))
        return Projected({"v": v_BTHV}, {"skip": views.v_BTD * self.skip})

    def mix(
        self, x: dict[str, Tensor], weights: dict[str, Tensor], past: Cache, rule: Recurrences, positions_BT: Tensor
    ) -> tuple[Tensor, Cache]:
        log_rate, log_angle, log_scale = upcast(weights["ring"]).unbind(-1)
        radius, angle = (-log_rate.exp()).exp(), log_angle.exp()
        eigenvalue_HS2 = torch.stack([radius * angle.cos(), radius * angle.sin()], -1)
        x_BTHS2 = key_gated(upcast(x["v"]).unflatten(-1, (-1, 2)) * log_scale.exp()[..., None], x)
        out, state = rule.scan_pairs(eigenvalue_HS2.expand_as(x_BTHS2), x_BTHS2, past.get("state"))
        return out.flatten(-2).to(x["v"].dtype), {"state": state}

    def merge(self, out_BTHV: Tensor, kept: dict[str, Tensor]) -> Tensor:
        # A rank's part of a sum over tensor ranks, as large as its part of the heads.
        return self.o(out_BTHV.flatten(-2)) + kept["skip"] * (out_BTHV.shape[2] / self.heads)
