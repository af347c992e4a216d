"""Skip-middle's controllers: what the gates of all layers cost, and how the prices follow the gates from step to step.

    loss = mean_l(alpha_l mean(g_l)) + mean_l(beta_l var(g_l))

over a group of tokens; var is the unbiased one. After every step a controller sees the mean and the population variance
of each layer's gates over the whole batch. Source: Lawson & Aitchison, arXiv 2506.21103.
Shape suffixes: B batch, T sequence (this rank's share), L layers, G groups (B, or 1).
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from models.ffn.groups import StatsGroup
from models.plugin import Plugin

Levels = dict[str, Tensor]  # by name, one number per layer each


class Price(NamedTuple):
    """Of a token's gates, `mean_GL (g - mean_from_L) + var_GL (s - var_from_L)`; s: the squared distance of g from its
    group's mean, times n / (n - 1)."""

    mean_GL: Tensor
    var_GL: Tensor
    mean_from_L: Tensor
    var_from_L: Tensor


@dataclasses.dataclass(frozen=True)
class GateController(Plugin, slot="controller", folder="models.depth.controllers"):
    """What skip-middle's gates cost.

    mean_coef, var_coef: the first prices of the mean and of the variance of a layer's gates. stats_group: the tokens
    over which the loss takes them.
    """

    mean_coef: float = 0.0
    var_coef: float = 0.0
    stats_group: StatsGroup = "sequence"

    def levels(self) -> Mapping[str, float]:
        """The first value of everything that is kept for each layer; `mean_coef` and `var_coef` are among it."""
        return {"mean_coef": self.mean_coef, "var_coef": self.var_coef}

    def check_layers(self, num_layers: int) -> None:
        """Raise ValueError where a setting does not fit the number of layers."""

    def price(self, mean_GL: Tensor, var_GL: Tensor, levels: Levels) -> Price:
        """Of groups with this mean and (unbiased) variance."""
        mean_L, var_L = levels["mean_coef"], levels["var_coef"]
        count, zero_L = mean_L.shape[0], torch.zeros_like(mean_L)
        return Price((mean_L / count).expand_as(mean_GL), (var_L / count).expand_as(var_GL), zero_L, zero_L)

    def update(self, levels: Levels, mean_L: Tensor, var_L: Tensor) -> Levels:
        """The levels after a step whose gates had this mean and population variance."""
        return levels


def penalty(
    gates_BTL: Tensor,
    valid_BT: Tensor,
    controller: GateController,
    levels: Levels,
    reduce: Callable[[Tensor], Tensor],
) -> Tensor:
    """This rank's share of the sum over groups of (tokens x loss of the group), shape [].

    The group's mean is a constant here: the squares around it change with it to second order only, so that the ranks'
    shares and their gradients add up. reduce: sums over the ranks that share a group.
    """
    with torch.no_grad():
        own_BTL = gates_BTL.masked_fill(~valid_BT[..., None], 0)
        count_B1 = valid_BT.sum(1, keepdim=True).to(own_BTL.dtype)
        sums = torch.cat([count_B1, own_BTL.sum(1), own_BTL.square().sum(1)], dim=1)
        sums = reduce(sums if controller.stats_group == "sequence" else sums.sum(0, keepdim=True))
        count_G1, sum_GL, square_GL = sums.split([1, gates_BTL.shape[-1], gates_BTL.shape[-1]], dim=1)
        mean_GL = sum_GL / count_G1.clamp_min(1)
        unbiased_G1 = count_G1 / (count_G1 - 1).clamp_min(1)
        var_GL = (square_GL / count_G1.clamp_min(1) - mean_GL.square()).clamp_min(0) * unbiased_G1
        price = Price(*(x.to(own_BTL.dtype) for x in controller.price(mean_GL, var_GL, levels)))
    square_BTL = (gates_BTL - mean_GL[:, None]).square() * unbiased_G1[:, None]
    cost_BTL = price.mean_GL[:, None] * (gates_BTL - price.mean_from_L)
    cost_BTL = cost_BTL + price.var_GL[:, None] * (square_BTL - price.var_from_L)
    return cost_BTL.masked_fill(~valid_BT[..., None], 0).sum()
