"""Gradients in one piece, for what refuses them otherwise."""

from typing import Any

import torch
from torch import Tensor


class ContiguousGradient(torch.autograd.Function):
    """The identity; its gradient is contiguous."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad.contiguous()
