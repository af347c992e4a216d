"""Mixture of experts: a router gives each token some of many SwiGLU experts.

Shape suffixes: B batch, T sequence, N = B*T tokens, D model width, K picks.
"""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Self

from torch import Tensor

from models.config import default
from models.context import LayerContext
from models.ffn.capacity import Room
from models.ffn.experts import Experts, SharedExpert
from models.ffn.groups import StatsGroup
from models.ffn.routed import RoutedFFN
from models.ffn.routing import RouterConfig
from models.limits import above_zero, at_least
from models.params import Linear
from models.pieces import WHOLE, Part
from models.slots import FFN, FFNConfig
from models.state import Result, Side, State


@dataclasses.dataclass(frozen=True)
class MoEConfig(FFNConfig, kind="moe"):
    """SwiGLU experts behind a router, dropless unless it has a capacity.

    hidden: width of an expert. router: which tokens it gets. shared_hidden: width of one more expert that every token
    takes; 0 for none. shared_gate: its output is multiplied by the sigmoid of one projection of the token (Qwen2-MoE,
    arXiv 2407.10671). capacity_factor: in training an expert takes at most this times its even share of the picks of
    its group, and those beyond are dropped: the token passes that expert by; null for dropless. capacity_group: a row
    of the batch, or all rows of a micro-batch.
    """

    num_experts: int
    hidden: int
    router: RouterConfig = default(RouterConfig, "mixtral")
    shared_hidden: int = 0
    shared_gate: bool = False
    capacity_factor: float | None = None
    capacity_group: StatsGroup = "sequence"

    example = MappingProxyType(
        {
            "num_experts": 4,
            "hidden": 8,
            "router": {"kind": "deepseek_v3", "top_k": 2},
            "shared_hidden": 8,
        }
    )

    def __post_init__(self) -> None:
        at_least(self, 1, "num_experts", "hidden")
        at_least(self, 0, "shared_hidden", hint=", which turns it off")
        above_zero(self, "capacity_factor", hint=", or null for no limit")
        self.router.picks(self.num_experts)
        if self.shared_gate and not self.shared_hidden:
            raise ValueError(
                "shared_gate has no shared expert to act on; give shared_hidden, or set shared_gate: false"
            )
        if self.capacity_factor is not None and self.router.limits_itself:
            raise ValueError(
                f"capacity_factor is {self.capacity_factor}, and with router {self.router.kind} experts take a fixed "
                "number of tokens already; use capacity_factor: null"
            )

    def canonical(self, d_model: int) -> Self:
        router = self.router.canonical(d_model)
        return dataclasses.replace(self, router=router, capacity_factor=None, capacity_group="sequence")

    def build(self, ctx: LayerContext) -> FFN:
        return MoE(self, ctx)

    def active_share(self) -> float:
        return self.router.picks(self.num_experts) / self.num_experts


class MoE(RoutedFFN):
    """`y = sum_k w_k expert_k(x) (+ shared(x), gated or not)`."""

    def __init__(self, config: MoEConfig, ctx: LayerContext) -> None:
        count = config.num_experts
        super().__init__(Experts(count, ctx.d_model, config.hidden, ctx.output_init))
        self.config, self.has_losses = config, config.router.has_losses
        self.router = config.router.build(ctx.d_model, count)
        self.room: Room | None = None
        if config.capacity_factor is not None:
            picks = config.capacity_factor * config.router.picks(count)
            self.room = Room(config.capacity_group, (picks,) * count, count)
        self.shared = SharedExpert(ctx.d_model, config.shared_hidden, ctx.output_init) if config.shared_hidden else None
        self.shared_gate = Linear(ctx.d_model, 1) if config.shared_gate else None

    def forward(self, x_BTD: Tensor, inputs: State, side: Side, part: Part = WHOLE) -> Result:
        routing, losses, load_E = self.router(x_BTD, side)
        keep_BTK, stats = routing.keep_BTK, {"expert_load": load_E}
        if self.room is not None and side.draws:
            keep_BTK = self.room(routing, side)
            stats["expert_dropped"] = self.room.dropped(routing, keep_BTK, side)
        x_ND = x_BTD.flatten(0, 1)
        keep_NK = None if keep_BTK is None else keep_BTK.flatten(0, 1)
        index_NK, weights_NK = routing.index_BTK.flatten(0, 1), routing.weights_BTK.flatten(0, 1)
        out_ND = self.run_experts(x_ND, index_NK, weights_NK, keep_NK, part)
        if self.shared is not None:
            shared_ND = self.shared(x_ND)
            if self.shared_gate is not None:
                shared_ND = shared_ND * self.shared_gate(x_ND).sigmoid()
            out_ND = out_ND + shared_ND
        return Result(out_ND.view_as(x_BTD), losses=losses, stats=stats)

    def after_step(self, stats: Mapping[str, Tensor]) -> None:
        self.router.after_step(stats)
