"""Expert choice: each expert picks its tokens, so that loads are even by construction (arXiv 2202.09368).

Shape suffixes: B batch, T sequence, E experts, K picks (here E: every token and every expert).
"""

import dataclasses
from typing import ClassVar, Self

import torch
from torch import Tensor

from models.ffn.capacity import Room
from models.ffn.routing import Router, RouterConfig, Routing
from models.limits import above_zero
from models.state import Side


@dataclasses.dataclass(frozen=True)
class ExpertChoiceConfig(RouterConfig, kind="expert_choice"):
    """Each expert takes the floor(capacity_factor T / E), at least 1, tokens of the largest softmax over experts, of a
    document's T tokens or of a micro-batch's; a token may get any number of experts (Zhou et al., arXiv 2202.09368).
    What a token gets depends on later ones: in a language model it sees what it is to predict, and cannot generate.

    capacity_factor: experts that a token gets on average.
    """

    causal: ClassVar[bool] = False
    incremental: ClassVar[bool] = False
    limits_itself: ClassVar[bool] = True

    capacity_factor: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        above_zero(self, "capacity_factor")

    def canonical(self, d_model: int) -> Self:
        return dataclasses.replace(super().canonical(d_model), stats_group=self.stats_group)

    @property
    def batch_independent(self) -> bool:
        return self.stats_group == "sequence"

    def picks(self, num_experts: int) -> float:
        if self.capacity_factor > num_experts:
            raise ValueError(
                f"capacity_factor is {self.capacity_factor}; a token cannot get more than the {num_experts} experts"
            )
        return self.capacity_factor

    def build(self, d_model: int, num_experts: int) -> Router:
        return ExpertChoice(self, d_model, num_experts)


class ExpertChoice(Router):
    def __init__(self, config: ExpertChoiceConfig, d_model: int, num_experts: int) -> None:
        super().__init__(config, d_model, num_experts)
        shares = (config.capacity_factor,) * num_experts
        self.room = Room(config.stats_group, shares, num_experts, by_document=True)

    def route(self, logits_BTE: Tensor, side: Side) -> Routing:
        probs_BTE = logits_BTE.softmax(-1)
        index_BTK = torch.arange(self.num_experts, device=logits_BTE.device).expand(logits_BTE.shape)
        asked = Routing(logits_BTE, probs_BTE, index_BTK, probs_BTE, priority_BTK=-probs_BTE.detach())
        return asked._replace(keep_BTK=self.room(asked, side))
