"""Switch's router: one expert per token, weighted by its probability (Fedus et al., arXiv 2101.03961).

Shape suffixes: B batch, T sequence, D model width, E experts, K picks (1).
"""

import dataclasses
from typing import Self

from torch import Tensor

from models.ffn.routing import BalancedConfig, Router, Routing, TopKRouter
from models.kernels.picks import best
from models.limits import at_least
from models.noise import uniform
from models.params import upcast
from models.state import Side


@dataclasses.dataclass(frozen=True)
class SwitchConfig(BalancedConfig, kind="switch"):
    """The expert of the largest softmax, weighted by it (arXiv 2101.03961). Balance loss: `E sum_e f_e P_e`.

    jitter: in training the router sees its input times numbers drawn
    from [1 - jitter, 1 + jitter].
    """

    jitter: float = 0.01

    one_pick = True

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 0, "jitter", hint=", which turns it off")
        if self.jitter >= 1:
            raise ValueError(f"jitter is {self.jitter}; it must be below 1, and the paper uses 0.01")

    def canonical(self, d_model: int) -> Self:
        return dataclasses.replace(super().canonical(d_model), jitter=0.0)

    def picks(self, num_experts: int) -> float:
        return 1

    def build(self, d_model: int, num_experts: int) -> Router:
        return Switch(self, d_model, num_experts)


class Switch(TopKRouter):
    def __init__(self, config: SwitchConfig, d_model: int, num_experts: int) -> None:
        super().__init__(config, 1, d_model, num_experts)
        self.jitter = config.jitter

    def logits(self, x_BTD: Tensor, side: Side) -> Tensor:
        if side.draws and self.jitter:
            draws_BTD = uniform(side, "router_jitter", x_BTD.shape[-1])
            x_BTD = upcast(x_BTD) * (1 + self.jitter * (2 * draws_BTD - 1))
        return super().logits(x_BTD, side)

    def route(self, logits_BTE: Tensor, side: Side) -> Routing:
        probs_BTE = logits_BTE.softmax(-1)
        index_BTK = side.choose(self, lambda: best(probs_BTE, 1))
        return Routing(logits_BTE, probs_BTE, index_BTK, probs_BTE.gather(-1, index_BTK))
