"""Picks of experts: which are made, where their rows stand, and their weights.

Experts read rows in the order of the experts. A pick's place is the number of its row there, -1 if it is not made.
Shape suffixes: `...` or N tokens, D width, E experts, K picks of a token, M = N*K picks, P those that are made.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def best(ranking_E: Tensor, top_k: int) -> Tensor:
    """The top_k experts, best first, [..., K]."""
    return ranking_E.detach().topk(top_k, dim=-1).indices


def normalized(weights: Tensor) -> Tensor:
    """weights / their sum over the last dimension; 0 where all are 0, which would be 0/0."""
    total = weights.sum(-1, keepdim=True)
    return weights / torch.where(total > 0, total, 1)


def of_picks(y_PD: Tensor, places_NK: Tensor) -> Tensor:
    """The row of each pick, [N, K, D]; 0 of those that are not made. P: every place below it is of one pick.

    Rows are copied in both directions: backward adds no two gradients.
    """
    return _OfPicks.apply(y_PD, places_NK)  # type: ignore[return-value]


def in_order(places_NK: Tensor, rows: int) -> Tensor:
    """The number among all M of the pick at each place, [P], where `rows` is P."""
    picks, place_M = places_NK.numel(), places_NK.flatten()
    if rows < picks:
        # Those that are not made meet in one more place, and are cut off with it.
        place_M = place_M.where(place_M >= 0, rows)
    return place_M.new_empty(rows + 1).scatter(0, place_M, torch.arange(picks, device=place_M.device))[:rows]


def copied(y_PD: Tensor, places_NK: Tensor) -> Tensor:
    """What `of_picks` returns."""
    (rows, width), picks = y_PD.shape, places_NK.numel()
    if rows == picks:
        out_MD = y_PD.index_select(0, places_NK.flatten())
    else:
        out_MD = y_PD.new_zeros(picks, width).index_copy_(0, in_order(places_NK, rows), y_PD)
    return out_MD.view(*places_NK.shape, width)


class _OfPicks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_PD: Tensor, places_NK: Tensor) -> Tensor:
        ctx.save_for_backward(places_NK)
        ctx.rows = len(y_PD)
        return copied(y_PD, places_NK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (places_NK,) = ctx.saved_tensors
        return grads[0].flatten(0, 1).index_select(0, in_order(places_NK, ctx.rows)), None
