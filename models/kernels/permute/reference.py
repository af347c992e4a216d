"""Tokens' rows in the order of their experts, in plain torch.

Shape suffixes: N tokens, D width, K picks of a token, P picks that are made.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.kernels.picks import copied, in_order


def permute(x_ND: Tensor, places_NK: Tensor, rows: int) -> Tensor:
    """`out[places[n, k]] = x[n]`, [P, D], where `rows` is P and every place below it is of one pick; -1 is of none.

    Backward sums each token's rows, in the order of its picks.
    """
    return _Permute.apply(x_ND, places_NK, rows)  # type: ignore[return-value]


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, places_NK: Tensor, rows: int) -> Tensor:
        ctx.save_for_backward(places_NK)
        return x_ND.index_select(0, in_order(places_NK, rows) // max(1, places_NK.shape[1]))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        # Sums of bfloat16 are rounded once, at their end.
        return copied(grads[0], *ctx.saved_tensors).sum(1), None, None
