"""LAuReL with residual weights: alpha F(x) + beta x, alpha and beta learned (Menghani et al., arXiv 2411.07501).

Shape suffixes: B batch, T sequence, D model width.
"""

import dataclasses
import math
from typing import Literal

import torch
from torch import Tensor, nn

from models.context import LayerContext
from models.limits import above_zero, at_least
from models.params import declare, upcast
from models.shortcuts.laurel import LowRank
from models.slots import Beside, ShortcutConfig
from models.state import State


@dataclasses.dataclass(frozen=True)
class LaurelWeights(ShortcutConfig, kind="laurel_rw"):
    """LAuReL-RW: alpha F(x) + beta x, total times a softmax of two learned numbers per sublayer.

    total: what the two sum to; 2 starts as the plain sublayer, while with 1 the stream shrinks from layer to layer.
    alpha: where the branch's weight starts, half of total by default; the path has the rest.
    """

    total: float = 2.0
    alpha: float | None = None

    def __post_init__(self) -> None:
        above_zero(self, "total")
        if self.alpha is not None and not 0 < self.alpha < self.total:
            raise ValueError(
                f"alpha is {self.alpha}; it must lie between 0 and total {self.total}, half of which treats both "
                "sides alike"
            )

    def weights(self) -> "ResidualWeights":
        return ResidualWeights(self.total, self.total / 2 if self.alpha is None else self.alpha)

    def build(self, ctx: LayerContext) -> nn.Module:
        return WeightedPath(self.weights(), nn.Identity())

    def beside(self, ctx: LayerContext, branch: Literal["mixer", "ffn"], path: nn.Module) -> Beside:
        assert isinstance(path, WeightedPath)
        return WeightedBranch(path.weights)


@dataclasses.dataclass(frozen=True)
class LaurelWeightsLowRank(LaurelWeights, kind="laurel_rw_lr"):
    """LAuReL-RW+LR: alpha F(x) + beta (x + B A x).

    rank: of B A, which starts at 0.
    """

    rank: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "rank")

    def build(self, ctx: LayerContext) -> nn.Module:
        return WeightedPath(self.weights(), LowRank(ctx.d_model, self.rank))


@dataclasses.dataclass(frozen=True)
class Logits:
    """[2], of which `alpha` is the first part of `total` times the softmax."""

    total: float
    alpha: float

    def __call__(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return torch.tensor([math.log(self.alpha), math.log(self.total - self.alpha)])


class ResidualWeights(nn.Module):
    """(alpha, beta), which sum to `total`: unbounded ones make training unstable, says the paper."""

    logits: nn.Parameter

    def __init__(self, total: float, alpha: float) -> None:
        super().__init__()
        self.total = total
        declare(self, "logits", (2,), Logits(total, alpha))

    def forward(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Shape [] each."""
        alpha, beta = (self.total * upcast(self.logits).softmax(0)).to(dtype).unbind()
        return alpha, beta


class WeightedPath(nn.Module):
    def __init__(self, weights: ResidualWeights, path: nn.Module) -> None:
        super().__init__()
        self.weights, self.path = weights, path

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.weights(x_BTD.dtype)[1] * self.path(x_BTD)


class WeightedBranch(Beside):
    def __init__(self, weights: ResidualWeights) -> None:
        super().__init__()
        self.weights = weights

    def forward(self, x_BTD: Tensor | None, view_BTD: Tensor, out_BTD: Tensor, inputs: State) -> tuple[Tensor, State]:
        return self.weights(out_BTD.dtype)[0] * out_BTD, {}
