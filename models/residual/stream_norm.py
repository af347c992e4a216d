"""Norms in front of the small matrices that hyper-connections draw from the streams: what `normed_product` takes.

Shape suffixes: D normalised width, K columns.
"""

from typing import Literal

from torch import Tensor, nn

from models.kernels.normed_product import NormedProduct
from models.params import Constant, declare

Kind = Literal["layer", "rms"]
# The product, and what it takes beside rows: columns [D, K], weight [D], bias [D], eps.
Operands = tuple[NormedProduct, Tensor, Tensor, Tensor | None, float]


class LayerNorm(nn.Module):
    """`weight * (x - mean) / sqrt(var + eps) + bias` (Ba et al., arXiv 1607.06450)."""

    weight: nn.Parameter
    bias: nn.Parameter

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps, self.product = eps, NormedProduct()
        declare(self, "weight", (dim,), Constant(1.0))
        declare(self, "bias", (dim,), Constant(0.0))

    def operands(self, columns_DK: Tensor) -> Operands:
        return self.product, columns_DK, self.weight, self.bias, self.eps


class OffsetRMSNorm(nn.Module):
    """`(1 + gamma) * x / sqrt(mean(x^2) + eps)`, gamma starting at 0."""

    gamma: nn.Parameter

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps, self.product = eps, NormedProduct()
        declare(self, "gamma", (dim,), Constant(0.0))

    def operands(self, columns_DK: Tensor) -> Operands:
        return self.product, columns_DK, 1 + self.gamma, None, self.eps


def stream_norm(kind: Kind, dim: int, eps: float) -> LayerNorm | OffsetRMSNorm:
    return LayerNorm(dim, eps) if kind == "layer" else OffsetRMSNorm(dim, eps)
