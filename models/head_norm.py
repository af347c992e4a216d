"""RMSNorm over all heads at once, where a tensor rank has only some of them.

Shape suffixes: B batch, T sequence, H heads, V width of a head, D model width.
"""

import torch
from torch import Tensor, nn

from models.params import Axis, Constant, Linear, declare, upcast


class NormedOutput(nn.Module):
    """`RMSNorm(heads) W_o`, in two steps: the norm is one number per token, by which the product may be divided later.

    `forward` gives each rank's part of the product and, as two more channels, of the sum of squares (two, so that it
    keeps its digits in bfloat16); both add up over ranks. `divide` comes after that.
    """

    weight: nn.Parameter

    def __init__(self, heads: int, width: int, output: Linear, eps: float) -> None:
        super().__init__()
        self.elements, self.eps, self.output = heads * width, eps, output
        declare(self, "weight", (heads, width), Constant(1.0), (Axis("heads", heads), None), decay=False)

    def forward(self, out_BTHV: Tensor, gate_BTHV: Tensor | None = None) -> Tensor:
        """gate: what the norm's output is multiplied by before the product."""
        squares_BT = upcast(out_BTHV).square().sum((-2, -1))
        high_BT = squares_BT.to(out_BTHV.dtype)
        low_BT = (squares_BT - high_BT).to(out_BTHV.dtype)
        weight = self.weight if gate_BTHV is None else self.weight * gate_BTHV
        product_BTD = self.output((out_BTHV * weight).flatten(-2))
        return torch.cat([product_BTD, high_BT[..., None], low_BT[..., None]], -1)

    def divide(self, sums_BTE: Tensor) -> Tensor:
        sums = upcast(sums_BTE)
        mean_square = sums[..., -2:].sum(-1, keepdim=True) / self.elements
        return (sums[..., :-2] * (mean_square + self.eps).rsqrt()).to(sums_BTE.dtype)
