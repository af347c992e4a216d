"""V-MoE's router: the tokens that are surest of their expert are served first (Riquelme et al., arXiv 2106.05974).

Shape suffixes: B batch, T sequence, E experts, K picks.
"""

import dataclasses

import torch
from torch import Tensor

from models.ffn.routing import Router, Routing
from models.kernels.picks import best
from models.params import upcast
from models.routers.noisy_top_k import NoisyConfig, NoisyRouter
from models.state import Side


@dataclasses.dataclass(frozen=True)
class VMoEConfig(NoisyConfig, kind="v_moe"):
    """Weights are the top_k of `softmax(W x + N(0, 1/E^2))`, as they are; the noise is drawn in training.
    Batch-priority routing (arXiv 2106.05974): where room is limited all first choices go before second ones, and among
    each those of tokens with a larger first weight, so that what a token gets depends on later ones."""

    top_k: int = 2
    importance_coef: float = 0.005
    load_coef: float = 0.005

    def build(self, d_model: int, num_experts: int) -> Router:
        return VMoE(self, d_model, num_experts)


class VMoE(NoisyRouter):
    def deviation(self, x_BTD: Tensor) -> Tensor:
        return upcast(x_BTD[:0]).new_full((), 1 / self.num_experts)

    def weigh(self, clean_BTE: Tensor, noisy_BTE: Tensor, side: Side) -> Routing:
        probs_BTE = noisy_BTE.softmax(-1)
        index_BTK = side.choose(self, lambda: best(probs_BTE, self.top_k))
        weights_BTK = probs_BTE.gather(-1, index_BTK)
        choice_K = torch.arange(self.top_k, device=index_BTK.device)
        priority_BTK = choice_K - weights_BTK[..., :1].detach()
        return Routing(noisy_BTE, probs_BTE, index_BTK, weights_BTK, priority_BTK=priority_BTK)

    def amounts(self, clean_BTE: Tensor, routing: Routing) -> Tensor:
        return clean_BTE.softmax(-1)

    def threshold(self, noisy_BTE: Tensor, picked_BTE: Tensor) -> Tensor:
        """The top_k-th largest logit, its own or not."""
        return noisy_BTE.topk(self.top_k, dim=-1).values[..., -1:]
