"""Norms in front of the small matrices that hyper-connections draw from the streams.

Shape suffixes: D normalised width.
"""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from models.params import Constant, declare

Kind = Literal["layer", "rms"]


class LayerNorm(nn.Module):
    """`weight * (x - mean) / sqrt(var + eps) + bias` over the last dimension (Ba et al., arXiv 1607.06450)."""

    weight: nn.Parameter
    bias: nn.Parameter

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        declare(self, "weight", (dim,), Constant(1.0))
        declare(self, "bias", (dim,), Constant(0.0))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)


class OffsetRMSNorm(nn.Module):
    """`(1 + gamma) * x / sqrt(mean(x^2) + eps)` over the last dimension, gamma starting at 0."""

    gamma: nn.Parameter

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        declare(self, "gamma", (dim,), Constant(0.0))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], 1 + self.gamma, self.eps)


def stream_norm(kind: Kind, dim: int, eps: float) -> nn.Module:
    return LayerNorm(dim, eps) if kind == "layer" else OffsetRMSNorm(dim, eps)
