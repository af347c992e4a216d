"""DeepSeek-V3's router: sigmoid scores, and a bias on picks that evens out loads without a loss (arXiv 2412.19437).

Shape suffixes: B batch, T sequence, E experts, K picks.
"""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Self

import torch
from torch import Tensor

from models.ffn.routing import Router, RouterConfig, Routing
from models.kernels.picks import best, normalized
from models.limits import at_least
from models.routers.deepseek_v2 import LimitedConfig, LimitedRouter
from models.state import Side


@dataclasses.dataclass(frozen=True)
class DeepSeekV3Config(LimitedConfig, kind="deepseek_v3"):
    """Weights are the picks' sigmoid scores divided by their sum, times scale; picks go by score + bias, and a group's
    score is that of its two best experts (arXiv 2412.19437, 2408.15664). Balance loss: `E / top_k sum_e f_e P_e`, P of
    scores divided by their sum.

    balance_rate: step of the bias towards even loads, once per optimiser step; 0 for none.
    """

    top_k: int = 8
    aux_coef: float = 0.0001
    scale: float = 2.5
    balance_rate: float = 0.001

    example = MappingProxyType({"top_k": 2, "num_groups": 2, "top_groups": 1})

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 0, "balance_rate", hint=", which turns it off")
        if self.top_k == 1:
            raise ValueError(
                "top_k is 1, and a score divided by itself is 1, which leaves the router untrained; use top_k 2 or "
                f"more, or a router for one pick{RouterConfig.such_as(lambda kind: kind.one_pick)}"
            )

    def canonical(self, d_model: int) -> Self:
        return dataclasses.replace(super().canonical(d_model), balance_rate=0.0)

    def build(self, d_model: int, num_experts: int) -> Router:
        return DeepSeekV3(self, d_model, num_experts)


class DeepSeekV3(LimitedRouter):
    """The bias decides picks and never weights; it stays float32 when the model is cast."""

    strongest = 2
    balance_bias: Tensor

    def __init__(self, config: DeepSeekV3Config, d_model: int, num_experts: int) -> None:
        super().__init__(config, d_model, num_experts)
        self.balance_rate = config.balance_rate
        self.declare_buffer("balance_bias", (num_experts,), 0.0)

    def route(self, logits_BTE: Tensor, side: Side) -> Routing:
        scores_BTE = logits_BTE.sigmoid()
        ranking_BTE = scores_BTE.detach() + self.balance_bias
        index_BTK = side.choose(self, lambda: best(self.within_groups(ranking_BTE), self.top_k))
        weights_BTK = normalized(scores_BTE.gather(-1, index_BTK)) * self.scale
        return Routing(logits_BTE, normalized(scores_BTE), index_BTK, weights_BTK)

    @torch.no_grad()
    def after_step(self, stats: Mapping[str, Tensor]) -> None:
        """bias += rate * sign(mean load - load), from the loads of the whole step (arXiv 2408.15664)."""
        if self.balance_rate:
            load_E = stats["expert_load"].to(self.balance_bias.device, torch.float64)
            step_E = (load_E.mean() - load_E).sign() * self.balance_rate
            self.balance_bias.add_(step_E.to(self.balance_bias.dtype))
