"""Mixtral's router: a softmax over the picked logits (Jiang et al., arXiv 2401.04088).

Shape suffixes: B batch, T sequence, E experts, K picks.
"""

import dataclasses

from torch import Tensor

from models.ffn.routing import Router, RouterConfig, Routing, TopKConfig, TopKRouter
from models.kernels.picks import best
from models.state import Side


@dataclasses.dataclass(frozen=True)
class MixtralConfig(TopKConfig, kind="mixtral"):
    """Weights are a softmax over the picks' logits, so that they sum to 1 (arXiv 2401.04088). Balance loss: Switch's,
    over all picks."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.top_k == 1:
            raise ValueError(
                "top_k is 1, and a softmax over one pick is 1 whatever its logit, which leaves the router untrained; "
                f"use top_k 2 or more, or a router for one pick{RouterConfig.such_as(lambda kind: kind.one_pick)}"
            )

    def build(self, d_model: int, num_experts: int) -> Router:
        return Mixtral(self, self.top_k, d_model, num_experts)


class Mixtral(TopKRouter):
    def route(self, logits_BTE: Tensor, side: Side) -> Routing:
        index_BTK = side.choose(self, lambda: best(logits_BTE, self.top_k))
        weights_BTK = logits_BTE.gather(-1, index_BTK).softmax(-1)
        return Routing(logits_BTE, logits_BTE.softmax(-1), index_BTK, weights_BTK)
