"""The sparsely-gated mixture's router: noise on logits, importance and load losses (Shazeer et al., arXiv 1701.06538).

Shape suffixes: B batch, T sequence, D model width, E experts, K picks.
"""

import dataclasses
from types import MappingProxyType
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from models.ffn.balance import z_loss
from models.ffn.routing import Routed, Router, RouterConfig, Routing
from models.kernels.picks import best
from models.limits import at_least
from models.noise import normal
from models.params import Constant, Init, declare, upcast
from models.state import Side


@dataclasses.dataclass(frozen=True)
class NoisyConfig(RouterConfig):
    """importance_coef: of the loss of the weights that experts get. load_coef: of the loss of the expected numbers of
    their tokens, a smooth function of the logits where there is noise."""

    top_k: int = 4
    importance_coef: float = 0.1
    load_coef: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "top_k")
        at_least(self, 0, "importance_coef", "load_coef", hint=", which turns it off")

    def canonical(self, d_model: int) -> Self:
        return dataclasses.replace(super().canonical(d_model), importance_coef=0.0, load_coef=0.0)

    @property
    def has_losses(self) -> bool:
        return super().has_losses or self.importance_coef > 0 or self.load_coef > 0

    def picks(self, num_experts: int) -> float:
        if self.top_k >= num_experts:
            raise ValueError(
                f"top_k is {self.top_k} and there are {num_experts} experts, so that the noise has none to leave out; "
                "use a smaller top_k"
            )
        return self.top_k


@dataclasses.dataclass(frozen=True)
class NoisyTopKConfig(NoisyConfig, kind="noisy_top_k"):
    """In training logits are `W x + N(0, 1) softplus(W_n x)`; weights are a softmax over the top_k logits; both
    matrices start at 0 (arXiv 1701.06538). Losses: squared coefficients of variation over experts."""

    example = MappingProxyType({"top_k": 2})

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 2, "top_k", hint="; a softmax over one pick is 1 whatever its logit")

    def build(self, d_model: int, num_experts: int) -> Router:
        return NoisyTopK(self, d_model, num_experts)


class NoisyRouter(Router):
    """Noise on logits in training, and losses of the coefficients of variation of two sums over tokens: of `amounts`
    that experts get, and of the probabilities that fresh noise would have a token picked."""

    def __init__(self, config: NoisyConfig, d_model: int, num_experts: int, init: Init | None = None) -> None:
        super().__init__(config, d_model, num_experts, init)
        self.top_k = config.top_k
        self.importance_coef, self.load_coef = config.importance_coef, config.load_coef

    def deviation(self, x_BTD: Tensor) -> Tensor:
        """Of the noise, [B, T, E] or what expands to it."""
        raise NotImplementedError

    def weigh(self, clean_BTE: Tensor, noisy_BTE: Tensor, side: Side) -> Routing:
        raise NotImplementedError

    def amounts(self, clean_BTE: Tensor, routing: Routing) -> Tensor:
        """What importance sums, [B, T, E]."""
        raise NotImplementedError

    def forward(self, x_BTD: Tensor, side: Side) -> Routed:
        clean_BTE, valid_BT = self.logits(x_BTD, side), side.valid_BT
        deviation, noisy_BTE = None, clean_BTE
        if side.draws:
            deviation = self.deviation(x_BTD)
            noisy_BTE = clean_BTE + deviation * normal(side, "router_noise", self.num_experts)
        routing = self.weigh(clean_BTE, noisy_BTE, side)
        losses, load_E = self.balance_losses(routing, side)
        if self.importance_coef:
            amounts_BTE = self.amounts(clean_BTE, routing)
            losses["importance"] = self.importance_coef * self.balance.variation(amounts_BTE, valid_BT)
        if self.load_coef:
            picked_BTE = torch.zeros_like(clean_BTE).scatter(-1, routing.index_BTK, 1.0)
            if deviation is not None:
                margin_BTE = clean_BTE - self.threshold(noisy_BTE, picked_BTE.bool())
                picked_BTE = torch.special.ndtr(margin_BTE / deviation)
            losses["load"] = self.load_coef * self.balance.variation(picked_BTE, valid_BT)
        if self.z_coef:
            losses["router_z"] = self.z_coef * z_loss(routing.logits_BTE, valid_BT)
        return Routed(routing, losses, load_E)

    def threshold(self, noisy_BTE: Tensor, picked_BTE: Tensor) -> Tensor:
        """What an expert's logit has to exceed for it to be picked: the top_k-th largest of the others."""
        top_BTK = noisy_BTE.topk(self.top_k + 1, dim=-1).values
        return torch.where(picked_BTE, top_BTK[..., -1:], top_BTK[..., -2:-1])


class NoisyTopK(NoisyRouter):
    noise_weight: torch.nn.Parameter

    def __init__(self, config: NoisyTopKConfig, d_model: int, num_experts: int) -> None:
        super().__init__(config, d_model, num_experts, Constant(0.0))
        declare(self, "noise_weight", (num_experts, d_model), Constant(0.0), role="router")

    def deviation(self, x_BTD: Tensor) -> Tensor:
        return F.softplus(F.linear(upcast(x_BTD), upcast(self.noise_weight)))

    def weigh(self, clean_BTE: Tensor, noisy_BTE: Tensor, side: Side) -> Routing:
        index_BTK = side.choose(self, lambda: best(noisy_BTE, self.top_k))
        weights_BTK = noisy_BTE.gather(-1, index_BTK).softmax(-1)
        return Routing(noisy_BTE, noisy_BTE.softmax(-1), index_BTK, weights_BTK)

    def amounts(self, clean_BTE: Tensor, routing: Routing) -> Tensor:
        return torch.zeros_like(clean_BTE).scatter(-1, routing.index_BTK, routing.weights_BTK)
