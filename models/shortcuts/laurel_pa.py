"""LAuReL with previous activations: the path also gets what a sublayer makes of earlier streams (arXiv 2411.07501).

    x_{i+1} = F(x_i) + x_i + B A sum_j gamma_j x_j    over earlier sublayers j < i, by which streams are counted

Shape suffixes: B batch, T sequence, D model width.
"""

import dataclasses
import functools
from typing import Literal

import torch
from torch import Tensor, nn

from models.context import LayerContext
from models.limits import at_least
from models.params import Constant, declare
from models.shortcuts.laurel import LowRank
from models.shortcuts.laurel_rw import LaurelWeights, ResidualWeights, WeightedPath
from models.slots import Beside, ShortcutConfig
from models.state import Entry, State


@dataclasses.dataclass(frozen=True)
class LaurelPrevious(ShortcutConfig, kind="laurel_pa"):
    """LAuReL-PA: F(x) + x + B A sum_j gamma_j x_j.

    rank: of B A, which starts at 0. previous: how many earlier streams, the latest ones; null for all of them. Each is
    one more model width per token in the state.
    """

    rank: int = 32
    previous: int | None = None

    def __post_init__(self) -> None:
        at_least(self, 1, "rank")
        at_least(self, 1, "previous", hint=", or null for all")

    def build(self, ctx: LayerContext) -> nn.Module:
        return nn.Identity()

    def beside(self, ctx: LayerContext, branch: Literal["mixer", "ffn"], path: nn.Module) -> Beside:
        return self.sum(ctx, branch, LowRank(ctx.d_model, self.rank), None)

    def sum(
        self, ctx: LayerContext, branch: Literal["mixer", "ffn"], low: LowRank, weights: ResidualWeights | None
    ) -> "Previous":
        """At the place of a branch."""
        index, count = 2 * ctx.index + (branch == "ffn"), 2 * ctx.num_layers
        first = 0 if self.previous is None else max(0, index - self.previous)
        return Previous(ctx.d_model, range(first, index), index, index < count - 1, low, weights)


@dataclasses.dataclass(frozen=True)
class LaurelLowRankPrevious(LaurelPrevious, kind="laurel_lr_pa"):
    """LAuReL-LR+PA: F(x) + x + B A (x + sum_j gamma_j x_j)."""

    def build(self, ctx: LayerContext) -> nn.Module:
        return LowRank(ctx.d_model, self.rank)

    def beside(self, ctx: LayerContext, branch: Literal["mixer", "ffn"], path: nn.Module) -> Beside:
        assert isinstance(path, LowRank)
        return self.sum(ctx, branch, path, None)


@dataclasses.dataclass(frozen=True)
class LaurelWeightsLowRankPrevious(LaurelPrevious, kind="laurel_rw_lr_pa"):
    """LAuReL-RW+LR+PA: alpha F(x) + beta (x + B A (x + sum_j gamma_j x_j)).

    total, alpha: see laurel_rw.
    """

    total: float = 2.0
    alpha: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        LaurelWeights(self.total, self.alpha)

    def build(self, ctx: LayerContext) -> nn.Module:
        return WeightedPath(LaurelWeights(self.total, self.alpha).weights(), LowRank(ctx.d_model, self.rank))

    def beside(self, ctx: LayerContext, branch: Literal["mixer", "ffn"], path: nn.Module) -> Beside:
        assert isinstance(path, WeightedPath) and isinstance(path.path, LowRank)
        return self.sum(ctx, branch, path.path, path.weights)


def stream(index: int) -> str:
    """The entry with the stream before sublayer `index`."""
    return f"stream.{index}"


class Previous(Beside):
    """Adds the part of earlier streams to the branch's output. The first sublayer, which has none, only keeps its own.

    kept: a later sublayer reads this one's stream. weights: of branch and path, if they are not 1.
    """

    peeks = True
    gamma: nn.Parameter

    def __init__(
        self, d_model: int, earlier: range, index: int, kept: bool, low: LowRank, weights: ResidualWeights | None
    ) -> None:
        super().__init__()
        self.index, self.weights = index, weights
        self.reads = tuple(stream(j) for j in earlier)
        self.writes = (Entry(stream(index), (d_model,)),) if kept else ()
        self.low_rank = low if earlier else None
        if earlier:
            declare(self, "gamma", (len(earlier),), Constant(1 / len(earlier)))

    def forward(self, x_BTD: Tensor | None, view_BTD: Tensor, out_BTD: Tensor, inputs: State) -> tuple[Tensor, State]:
        assert x_BTD is not None
        if self.low_rank is None:
            added_BTD = None
        else:
            terms = [gamma * inputs[name] for gamma, name in zip(self.gamma, self.reads, strict=True)]
            added_BTD = self.low_rank.low(functools.reduce(torch.add, terms))
        if self.weights is not None:
            alpha, beta = self.weights(out_BTD.dtype)
            out_BTD, added_BTD = alpha * out_BTD, None if added_BTD is None else beta * added_BTD
        out_BTD = out_BTD if added_BTD is None else out_BTD + added_BTD
        return out_BTD, {stream(self.index): x_BTD} if self.writes else {}

    def flops_per_token(self, d_model: int) -> float:
        return 2 * len(self.reads) * d_model
