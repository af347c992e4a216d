"""The router of mixtures of attention heads: probabilities as they are, and three losses (arXiv 2210.05144).

Shape suffixes: B batch, T sequence, E experts, K picks.
"""

import dataclasses
from types import MappingProxyType
from typing import Self

import torch
from torch import Tensor

from models.ffn.routing import Router, Routing, TopKConfig, TopKRouter
from models.kernels.picks import best
from models.limits import at_least
from models.state import Side


@dataclasses.dataclass(frozen=True)
class MoATopKConfig(TopKConfig, kind="moa_top_k"):
    """Weights are the picks' softmax over all experts, not divided by their sum, as in the authors' code (Zhang et al.,
    arXiv 2210.05144). Balance loss: `E / top_k sum_e f_e P_e`.

    variation_coef: of the squared coefficient of variation of the weights that experts get, over a sample of experts.
    """

    variation_coef: float = 0.0
    z_coef: float = 0.001

    example = MappingProxyType({"variation_coef": 0.02})

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 0, "variation_coef", hint=", which turns it off")

    def canonical(self, d_model: int) -> Self:
        return dataclasses.replace(super().canonical(d_model), variation_coef=0.0)

    @property
    def has_losses(self) -> bool:
        return super().has_losses or self.variation_coef > 0

    def picks(self, num_experts: int) -> float:
        if self.variation_coef and num_experts == 1:
            raise ValueError(f"variation_coef is {self.variation_coef} and one expert does not vary; set it to 0")
        return super().picks(num_experts)

    def build(self, d_model: int, num_experts: int) -> Router:
        return MoARouter(self, d_model, num_experts)


class MoARouter(TopKRouter):
    def __init__(self, config: MoATopKConfig, d_model: int, num_experts: int) -> None:
        super().__init__(config, config.top_k, d_model, num_experts)
        self.variation_coef, self.loss_scale = config.variation_coef, num_experts / config.top_k

    def route(self, logits_BTE: Tensor, side: Side) -> Routing:
        probs_BTE = logits_BTE.softmax(-1)
        index_BTK = side.choose(self, lambda: best(probs_BTE, self.top_k))
        return Routing(logits_BTE, probs_BTE, index_BTK, probs_BTE.gather(-1, index_BTK))

    def balance_losses(self, routing: Routing, side: Side) -> tuple[dict[str, Tensor], Tensor]:
        losses, load_E = super().balance_losses(routing, side)
        if self.variation_coef:
            amounts_BTE = torch.zeros_like(routing.probs_BTE).scatter(-1, routing.index_BTK, routing.weights_BTK)
            of_sample = self.num_experts / (self.num_experts - 1)
            variation = self.balance.variation(amounts_BTE, side.valid_BT)
            losses["variation"] = self.variation_coef * of_sample * variation
        return losses, load_E
