"""Sinkhorn-Knopp: from any matrix of logits to a matrix whose rows and columns sum to 1.

Shape suffixes: N rows and columns.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def _steps(logits_NN: Tensor, iterations: int) -> list[Tensor]:
    """The logarithm of the matrix after every normalisation: of the columns first, then of the rows, and so on."""
    steps = []
    for _ in range(iterations):
        for dim in (-2, -1):
            logits_NN = logits_NN.log_softmax(dim)
            steps.append(logits_NN)
    return steps


class _Sinkhorn(torch.autograd.Function):
    """A Function, because autograd would keep every step: 2 x iterations matrices per token. They are made again."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, iterations: int) -> Tensor:
        ctx.save_for_backward(logits)
        ctx.iterations = iterations
        return _steps(logits, iterations)[-1].exp()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (logits,) = ctx.saved_tensors
        steps = _steps(logits, ctx.iterations)
        gradient = gradients[0] * steps[-1].exp()
        for index in reversed(range(len(steps))):
            dim = -1 if index % 2 else -2
            gradient = gradient - steps[index].exp() * gradient.sum(dim, keepdim=True)
        return gradient, None


def sinkhorn(logits_NN: Tensor, iterations: int) -> Tensor:
    """exp(logits) with its columns (sums over dim -2) and then its rows normalised, `iterations` >= 1 times.

    In logarithms, so that no logit is too large. Sinkhorn & Knopp (1967), as in arXiv 2512.24880, section 4.2.
    """
    return _Sinkhorn.apply(logits_NN, iterations)  # type: ignore[return-value]
