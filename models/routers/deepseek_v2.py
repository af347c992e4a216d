"""DeepSeek-V2's router: softmax scores as they are, from the best groups of experts (arXiv 2405.04434).

Shape suffixes: B batch, T sequence, E experts, G groups of experts, L experts of a group, K picks.
"""

import dataclasses
from types import MappingProxyType

import torch
from torch import Tensor

from models.ffn.routing import Router, Routing, TopKConfig, TopKRouter
from models.kernels.picks import best
from models.limits import above_zero, at_least
from models.state import Side


@dataclasses.dataclass(frozen=True)
class LimitedConfig(TopKConfig):
    """num_groups, top_groups: experts lie in that many equal groups, such as one per node, and a token picks from its
    best ones alone. scale: factor on the weights."""

    num_groups: int = 1
    top_groups: int = 1
    scale: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "num_groups", "top_groups")
        above_zero(self, "scale")
        if self.top_groups > self.num_groups:
            raise ValueError(f"top_groups is {self.top_groups} of num_groups {self.num_groups}; use no more than those")

    def picks(self, num_experts: int) -> float:
        if num_experts % self.num_groups:
            raise ValueError(f"num_groups is {self.num_groups}, which does not divide the {num_experts} experts")
        within = num_experts // self.num_groups * self.top_groups
        if self.top_k > within:
            raise ValueError(
                f"top_k is {self.top_k}, and a token picks among the {within} experts of top_groups {self.top_groups}; "
                "use a smaller top_k or more top_groups"
            )
        return super().picks(num_experts)


@dataclasses.dataclass(frozen=True)
class DeepSeekV2Config(LimitedConfig, kind="deepseek_v2"):
    """Weights are the picks' softmax over all experts, times scale, and not divided by their sum (arXiv 2401.06066,
    2405.04434). A group's score is its best expert's. Balance loss: `E / top_k sum_e f_e P_e`."""

    top_k: int = 6
    aux_coef: float = 0.003

    example = MappingProxyType({"top_k": 2, "num_groups": 2, "top_groups": 1})

    def build(self, d_model: int, num_experts: int) -> Router:
        return DeepSeekV2(self, d_model, num_experts)


class LimitedRouter(TopKRouter):
    """Picks within the best groups of experts. `strongest` experts of a group make its score."""

    strongest = 1

    def __init__(self, config: LimitedConfig, d_model: int, num_experts: int) -> None:
        super().__init__(config, config.top_k, d_model, num_experts)
        self.num_groups, self.top_groups, self.scale = config.num_groups, config.top_groups, config.scale
        self.loss_scale = num_experts / config.top_k

    def within_groups(self, ranking_BTE: Tensor) -> Tensor:
        """-inf outside of the best groups: a number such as 0 could beat what is inside."""
        if self.top_groups == self.num_groups:
            return ranking_BTE
        ranking_BTGL = ranking_BTE.unflatten(-1, (self.num_groups, -1))
        strongest = min(self.strongest, ranking_BTGL.shape[-1])
        groups_BTG = ranking_BTGL.topk(strongest, dim=-1).values.sum(-1)
        chosen_BTG = torch.zeros_like(groups_BTG).scatter(-1, best(groups_BTG, self.top_groups), 1.0).bool()
        return ranking_BTGL.masked_fill(~chosen_BTG[..., None], -torch.inf).flatten(-2)


class DeepSeekV2(LimitedRouter):
    def route(self, logits_BTE: Tensor, side: Side) -> Routing:
        probs_BTE = logits_BTE.softmax(-1)
        index_BTK = side.choose(self, lambda: best(self.within_groups(probs_BTE.detach()), self.top_k))
        return Routing(logits_BTE, probs_BTE, index_BTK, probs_BTE.gather(-1, index_BTK) * self.scale)
