"""GShard's router: two experts, the second by chance, and first choices served before second ones (arXiv 2006.16668).

Shape suffixes: B batch, T sequence, E experts, K picks (2).
"""

import dataclasses
from typing import Self

import torch
from torch import Tensor

from models.ffn.routing import BalancedConfig, Router, Routing, TopKRouter
from models.kernels.picks import best, normalized
from models.noise import uniform
from models.state import Side


@dataclasses.dataclass(frozen=True)
class GShardConfig(BalancedConfig, kind="gshard"):
    """The two largest softmax probabilities divided by their sum; in training the second expert is used with
    probability min(1, 2 w) of its weight w (Lepikhin et al., arXiv 2006.16668). Where room is limited all first choices
    go before second ones, so that a token's second depends on later tokens. Balance loss: `E sum_e f_e P_e`, f of first
    choices alone.

    random_second: whether the second expert is drawn.
    """

    random_second: bool = True

    def canonical(self, d_model: int) -> Self:
        return dataclasses.replace(super().canonical(d_model), random_second=True)

    def picks(self, num_experts: int) -> float:
        if num_experts < 2:
            raise ValueError(f"num_experts is {num_experts}, and router gshard picks 2; use more experts")
        return 2

    def build(self, d_model: int, num_experts: int) -> Router:
        return GShard(self, d_model, num_experts)


class GShard(TopKRouter):
    def __init__(self, config: GShardConfig, d_model: int, num_experts: int) -> None:
        super().__init__(config, 2, d_model, num_experts)
        self.random_second = config.random_second

    def route(self, logits_BTE: Tensor, side: Side) -> Routing:
        probs_BTE = logits_BTE.softmax(-1)
        index_BTK = side.choose(self, lambda: best(probs_BTE, 2))
        weights_BTK = normalized(probs_BTE.gather(-1, index_BTK))
        keep_BTK = None
        if self.random_second and side.draws:
            chance_BT1 = uniform(side, "router_second", 1)
            second_BT1 = side.choose(self, lambda: chance_BT1 < 2 * weights_BTK[..., 1:].detach())
            keep_BTK = torch.cat([torch.ones_like(second_BT1), second_BT1], dim=-1)
        choice_BTK = torch.arange(2, device=index_BTK.device).expand_as(index_BTK)
        return Routing(logits_BTE, probs_BTE, index_BTK, weights_BTK, keep_BTK, choice_BTK)

    def balanced_picks(self, routing: Routing) -> Tensor:
        return routing.index_BTK[..., :1]
