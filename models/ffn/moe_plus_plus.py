"""MoE++: experts that cost nothing beside FFN experts, and routers that see the previous router's logits.

Shape suffixes: B batch, T sequence, N = B*T tokens, D model width, E all experts, F FFN experts, C constant experts,
K picks.
"""

import dataclasses
from types import MappingProxyType
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.context import LayerContext
from models.ffn.balance import Balance
from models.ffn.capacity import Room
from models.ffn.experts import Experts
from models.ffn.groups import StatsGroup
from models.ffn.routed import RoutedFFN
from models.ffn.routing import LinearRouter, Routing
from models.kernels.combine.reference import Free
from models.kernels.masked_gate import MaskedGate
from models.limits import above_zero, at_least
from models.params import Normal, declare, upcast
from models.pieces import WHOLE, Part
from models.slots import FFN, FFNConfig
from models.state import Entry, Result, Side, State

LOGITS = "router_logits"  # [B, T, E]: the last router's logits, its own residual included


@dataclasses.dataclass(frozen=True)
class MoEPlusPlusConfig(FFNConfig, kind="moe_plus_plus"):
    """Jin et al., arXiv 2410.07348. Experts in this order: FFN, constant, copy, zero.

    num_experts: FFN experts. hidden: their width. tau: weight of an expert without computation in the balance loss,
    relative to an FFN expert; smaller sends it more tokens. aux_coef: of that loss. stats_group: the tokens over which
    it counts loads. capacity_factor: in training an FFN expert takes at most the share
    `capacity_factor tau / (tau N_F + N_Z)` of its group's picks, any other tau^-1 times as many (N_F FFN experts, N_Z
    others), and picks beyond are dropped; null for dropless. capacity_group: a row of the batch, or all rows of a
    micro-batch.
    """

    num_experts: int
    hidden: int
    num_constant: int = 2
    num_copy: int = 1
    num_zero: int = 1
    top_k: int = 2
    tau: float = 0.75
    aux_coef: float = 0.01
    stats_group: StatsGroup = "sequence"
    capacity_factor: float | None = None
    capacity_group: StatsGroup = "sequence"

    example = MappingProxyType({"num_experts": 4, "hidden": 8})

    def __post_init__(self) -> None:
        at_least(self, 1, "num_experts", "hidden")
        at_least(self, 0, "num_constant", "num_copy", "num_zero", "aux_coef")
        above_zero(self, "capacity_factor", hint=", or null for no limit")
        if not 1 <= self.top_k <= self.num_total:
            raise ValueError(
                f"top_k is {self.top_k}; it must lie between 1 and the {self.num_total} experts of all types"
            )
        if not 0 < self.tau <= 1:
            raise ValueError(f"tau is {self.tau}; it must lie in (0, 1], where 1 balances all experts alike")

    def canonical(self, d_model: int) -> Self:
        training = {"tau": 1.0, "aux_coef": 0.0, "stats_group": "sequence"}
        return dataclasses.replace(self, **training, capacity_factor=None, capacity_group="sequence")

    @property
    def num_total(self) -> int:
        return self.num_experts + self.num_constant + self.num_copy + self.num_zero

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        return self.num_experts, self.num_constant, self.num_copy, self.num_zero

    def build(self, ctx: LayerContext) -> FFN:
        router = LinearRouter(ctx.d_model, self.num_total)
        return MoEPlusPlus(self, ctx, router, MaskedTopK(self.top_k, self.num_total - self.num_zero))

    def room(self) -> Room | None:
        """The heterogeneous capacity, counted over picks: a factor of 1 is enough where loads are as the balance loss
        wants them."""
        if self.capacity_factor is None:
            return None
        free, picks = self.num_total - self.num_experts, self.capacity_factor * self.top_k
        numerators = (picks * self.tau,) * self.num_experts + (picks,) * free
        return Room(self.capacity_group, numerators, self.tau * self.num_experts + free)

    def active_share(self) -> float:
        """When the balance loss is at its least: FFN experts then get tau^-1 times less than the others."""
        ffn, free = self.num_experts, (self.num_total - self.num_experts) / self.tau
        return self.top_k / (ffn + free)

    def linked(self, other: FFNConfig | None) -> bool:
        """Whether this layer's router and that of `other`, the nearest MoE++ layer on one side, see each other."""
        return isinstance(other, MoEPlusPlusConfig) and other.num_total == self.num_total


def nearest(layers: tuple[FFNConfig, ...]) -> MoEPlusPlusConfig | None:
    """The first MoE++ layer."""
    return next((ffn for ffn in layers if isinstance(ffn, MoEPlusPlusConfig)), None)


class MaskedTopK(nn.Module):
    """p = softmax(logits + the gating residual), its top_k, the weight of zero experts (index >= first_zero) set to 0,
    the rest divided by their sum: a zero expert hands its share to the other picks. A token that only picks zero
    experts gets 0. The routing's logits are those that the next router adds to."""

    def __init__(self, top_k: int, first_zero: int) -> None:
        super().__init__()
        self.top_k, self.first_zero = top_k, first_zero
        self.gate = MaskedGate()

    def forward(self, logits_BTE: Tensor, side: Side, residual_BTE: Tensor | None = None) -> Routing:
        def gated(picked_BTK: Tensor | None = None) -> Routing:
            return Routing(*self.gate(logits_BTE, residual_BTE, self.top_k, self.first_zero, picked_BTK))

        if side.choices is None:
            return gated()
        with torch.no_grad():
            picked_BTK = side.choose(self, lambda: gated().index_BTK)
        return gated(picked_BTK)


class ConstantExperts(nn.Module):
    """`a1 x + a2 v` with [a1, a2] = softmax(W x), per expert."""

    def __init__(self, count: int, d_model: int) -> None:
        super().__init__()
        self.weight: nn.Parameter
        self.value: nn.Parameter
        declare(self, "weight", (count, 2, d_model), Normal(0.02), role="gate")
        declare(self, "value", (count, d_model), Normal(1.0), decay=False)

    def forward(self, x_ND: Tensor, gates_NC: Tensor) -> tuple[Tensor, Tensor]:
        """What `sum_c gate_c expert_c(x)` is made of: the share of x [N, 1], and of each value [N, C]."""
        mix_NC2 = F.linear(x_ND, upcast(self.weight).flatten(0, 1)).unflatten(-1, (-1, 2)).softmax(-1)
        keep_NC, take_NC = (mix_NC2 * gates_NC[..., None]).unbind(-1)
        return keep_NC.sum(-1, keepdim=True), take_NC


class MoEPlusPlus(RoutedFFN):
    """`y = sum_k w_k expert_k(x)`. Only picks of FFN experts are dispatched; the others are computed in place for all
    tokens, at the cost of a few vectors."""

    def __init__(self, config: MoEPlusPlusConfig, ctx: LayerContext, router: nn.Module, select: nn.Module) -> None:
        super().__init__(Experts(config.num_experts, ctx.d_model, config.hidden, ctx.output_init))
        self.balance, self.room = Balance(config.stats_group), config.room()
        self.config, self.select = config, select
        self.has_losses = config.aux_coef > 0
        ffns = tuple(layer.ffn for layer in ctx.layers)
        self.router = router
        self.router_residual: LinearRouter | None = None
        if config.linked(nearest(ffns[: ctx.index][::-1])):
            self.router_residual = LinearRouter(config.num_total, config.num_total, wide=False)
            self.reads = (LOGITS,)
        if config.linked(nearest(ffns[ctx.index + 1 :])):
            self.writes = (Entry(LOGITS, (config.num_total,), dtype=torch.float32),)
        self.constants = ConstantExperts(config.num_constant, ctx.d_model) if config.num_constant else None

    def forward(self, x_BTD: Tensor, inputs: State, side: Side, part: Part = WHOLE) -> Result:
        """Of a part, experts without a width count an equal share."""
        config = self.config
        residual_BTE = None if self.router_residual is None else self.router_residual(inputs[LOGITS])
        routing, valid_BT = self.select(self.router(x_BTD), side, residual_BTE), side.valid_BT
        index_NK, weights_NK = routing.index_BTK.flatten(0, 1), routing.weights_BTK.flatten(0, 1)
        of_ffn_NK = index_NK < config.num_experts
        stats = {"expert_load": self.balance.load(routing.index_BTK, None, valid_BT, config.num_total)}
        if self.room is not None and side.draws:
            fits_BTK = self.room(routing, side)
            stats["expert_dropped"] = self.room.dropped(routing, fits_BTK, side)
            room_NK = fits_BTK.flatten(0, 1)
            of_ffn_NK, weights_NK = of_ffn_NK & room_NK, weights_NK * room_NK
        u_ND = self.expert_input(x_BTD.flatten(0, 1))
        out_ND = self.run_experts(
            u_ND, index_NK, weights_NK, of_ffn_NK, part, self.free(u_ND, index_NK, weights_NK, part)
        )
        losses: dict[str, Tensor] = {}
        if config.aux_coef:
            terms_E = self.balance.terms(routing.probs_BTE, routing.index_BTK, valid_BT)
            ffn, free = terms_E.tensor_split([config.num_experts])
            losses["load_balance"] = config.aux_coef * (ffn.sum() + config.tau * free.sum())
        writes = {LOGITS: routing.logits_BTE} if self.writes else {}
        return Result(out_ND.view_as(x_BTD), writes, losses, stats)

    def expert_input(self, x_ND: Tensor) -> Tensor:
        return x_ND

    def free(self, u_ND: Tensor, index_NK: Tensor, weights_NK: Tensor, part: Part) -> Free:
        """What the copy and constant experts add. Zero experts add nothing."""
        gates_NE = weights_NK.new_zeros(u_ND.shape[0], self.config.num_total).scatter(1, index_NK, weights_NK)
        _, constant_NC, copy_NE, _ = gates_NE.split(self.config.sizes, dim=1)
        own_N1, take_NC, value_CD = copy_NE.sum(1, keepdim=True), constant_NC, u_ND.new_zeros(0, u_ND.shape[1])
        if self.constants is not None:
            kept_N1, take_NC = self.constants(upcast(u_ND), constant_NC)
            own_N1, value_CD = own_N1 + kept_N1, self.constants.value
        return Free(u_ND, own_N1 / part.count, take_NC / part.count, value_CD)
