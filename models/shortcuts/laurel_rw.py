"""LAuReL with residual weights: alpha F(x) + beta x, alpha and beta learned (Menghani et al., arXiv 2411.07501).

Shape suffixes: B batch, T sequence, D model width.
"""

import dataclasses
import math
from typing import Literal

import torch
from torch import Tensor, nn

from models.context import LayerContext
from models.limits import at_least
from models.params import declare, upcast
from models.shortcuts.laurel import LowRank
from models.slots import Beside, ShortcutConfig
from models.state import State


@dataclasses.dataclass(frozen=True)
class LaurelWeights(ShortcutConfig, kind="laurel_rw"):
    """LAuReL-RW: alpha F(x) + beta x, a softmax of two learned numbers per sublayer.

    alpha: where the branch's weight starts, between 0 and 1; the path has the rest.
    """

    alpha: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.alpha < 1:
            raise ValueError(f"alpha is {self.alpha}; it must lie between 0 and 1, and 0.5 treats both sides alike")

    def build(self, ctx: LayerContext) -> nn.Module:
        return WeightedPath(ResidualWeights(self.alpha), nn.Identity())

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
        return WeightedPath(ResidualWeights(self.alpha), LowRank(ctx.d_model, self.rank))


@dataclasses.dataclass(frozen=True)
class Logits:
    """[2], of which alpha is the softmax's first part."""

    alpha: float

    def __call__(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return torch.tensor([math.log(self.alpha), math.log(1 - self.alpha)])


class ResidualWeights(nn.Module):
    """(alpha, beta), which sum to 1: unbounded ones make training unstable, says the paper."""

    logits: nn.Parameter

    def __init__(self, alpha: float) -> None:
        super().__init__()
        declare(self, "logits", (2,), Logits(alpha))

    def forward(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Shape [] each."""
        alpha, beta = upcast(self.logits).softmax(0).to(dtype).unbind()
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
