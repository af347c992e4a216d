"""What all routers share: the slot, picks and their weights, the linear map to logits. Kinds are in models/routers.

Shape suffixes: B batch, T sequence (this rank's share), D model width, E experts, K picks.
"""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from models.buffers import Buffers
from models.ffn.balance import Balance, z_loss
from models.ffn.groups import StatsGroup
from models.limits import at_least
from models.params import Init, Linear, Normal, declare, upcast
from models.plugin import Plugin
from models.state import Side


class Routing(NamedTuple):
    """logits_BTE: what the picks were made from. probs_BTE: sums to 1 over experts; what balance losses average.
    index_BTK: the experts picked, best first. weights_BTK: what their outputs are multiplied by. keep_BTK: the picks
    that count; None is all. priority_BTK: where experts have limited room, smaller ones go first; None: earlier tokens.
    """

    logits_BTE: Tensor
    probs_BTE: Tensor
    index_BTK: Tensor
    weights_BTK: Tensor
    keep_BTK: Tensor | None = None
    priority_BTK: Tensor | None = None


class Routed(NamedTuple):
    """losses: as in `Result`. load_E: picks of each expert by valid tokens, before any is dropped for lack of room."""

    routing: Routing
    losses: Mapping[str, Tensor]
    load_E: Tensor


@dataclasses.dataclass(frozen=True)
class RouterConfig(Plugin, slot="router", folder="models.routers"):
    """Which experts take which tokens, and with what weight: a part of ffn moe.

    z_coef: of the router z-loss (ST-MoE, arXiv 2202.08906). stats_group: the tokens that losses, and experts that
    choose tokens, see together: a row of the batch, or all rows of a micro-batch.
    """

    causal: ClassVar[bool] = True
    incremental: ClassVar[bool] = True
    limits_itself: ClassVar[bool] = False  # experts take a fixed number of tokens
    one_pick: ClassVar[bool] = False  # made for one expert per token, whose weight depends on its logit

    z_coef: float = 0.0
    stats_group: StatsGroup = "sequence"

    def __post_init__(self) -> None:
        at_least(self, 0, "z_coef", hint=", which turns it off")

    def canonical(self, d_model: int) -> Self:
        return dataclasses.replace(self, z_coef=0.0, stats_group="sequence")

    @property
    def batch_independent(self) -> bool:
        return True

    @property
    def has_losses(self) -> bool:
        return self.z_coef > 0

    def picks(self, num_experts: int) -> float:
        """Experts that a token takes, on average. Raises ValueError for a number of experts that it cannot serve."""
        raise NotImplementedError

    def build(self, d_model: int, num_experts: int) -> "Router":
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class BalancedConfig(RouterConfig):
    """aux_coef: of the balance loss."""

    aux_coef: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 0, "aux_coef", hint=", which turns it off")

    def canonical(self, d_model: int) -> Self:
        return dataclasses.replace(super().canonical(d_model), aux_coef=0.0)

    @property
    def has_losses(self) -> bool:
        return super().has_losses or self.aux_coef > 0


@dataclasses.dataclass(frozen=True)
class TopKConfig(BalancedConfig):
    """top_k: experts that each token takes."""

    top_k: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "top_k")

    def picks(self, num_experts: int) -> float:
        if not 1 <= self.top_k <= num_experts:
            raise ValueError(f"top_k is {self.top_k}; it must lie between 1 and num_experts, which is {num_experts}")
        return self.top_k


class Router(Buffers):
    """A subclass defines `route`, and may define `logits` and `balance_losses`. Computes at least in float32 whatever
    the model's type: near ties decide picks."""

    weight: torch.nn.Parameter

    def __init__(self, config: RouterConfig, d_model: int, num_experts: int, init: Init | None = None) -> None:
        super().__init__()
        self.z_coef, self.num_experts = config.z_coef, num_experts
        self.balance = Balance(config.stats_group)
        declare(self, "weight", (num_experts, d_model), init or Normal(0.02), role="router")

    def logits(self, x_BTD: Tensor, side: Side) -> Tensor:
        return F.linear(upcast(x_BTD), upcast(self.weight))

    def route(self, logits_BTE: Tensor, side: Side) -> Routing:
        raise NotImplementedError

    def balance_losses(self, routing: Routing, side: Side) -> tuple[dict[str, Tensor], Tensor]:
        """(losses by name, load_E)."""
        return {}, self.balance.load(routing.index_BTK, routing.keep_BTK, side.valid_BT, self.num_experts)

    def forward(self, x_BTD: Tensor, side: Side) -> Routed:
        routing = self.route(self.logits(x_BTD, side), side)
        losses, load_E = self.balance_losses(routing, side)
        if self.z_coef:
            losses["router_z"] = self.z_coef * z_loss(routing.logits_BTE, side.valid_BT)
        return Routed(routing, losses, load_E)

    def after_step(self, stats: Mapping[str, Tensor]) -> None:
        """Once per optimiser step; see `FFN.after_step`."""


class TopKRouter(Router):
    """With Switch's balance loss `aux_coef loss_scale sum_e f_e P_e`: f picks per token, P the mean probability."""

    def __init__(self, config: BalancedConfig, top_k: int, d_model: int, num_experts: int) -> None:
        super().__init__(config, d_model, num_experts)
        self.top_k, self.aux_coef = top_k, config.aux_coef
        self.loss_scale = float(num_experts)

    def balanced_picks(self, routing: Routing) -> Tensor:
        """The picks that f counts."""
        return routing.index_BTK

    def balance_losses(self, routing: Routing, side: Side) -> tuple[dict[str, Tensor], Tensor]:
        losses, load_E = super().balance_losses(routing, side)
        if self.aux_coef:
            terms_E = self.balance.terms(routing.probs_BTE, self.balanced_picks(routing), side.valid_BT)
            losses["load_balance"] = self.aux_coef * self.loss_scale * terms_E.sum()
        return losses, load_E


class LinearRouter(Linear):
    """`logits = W x`, at least in float32. wide: see `ParamSpec`."""

    def __init__(self, d_in: int, num_experts: int, wide: bool = True) -> None:
        super().__init__(d_in, num_experts, role="router", wide=wide)

    def forward(self, x_ND: Tensor) -> Tensor:
        return F.linear(upcast(x_ND), upcast(self.weight))
