"""Linear maps whose products are of float8 (Micikevicius et al., arXiv 2209.05433), by torch's scaled product.

Each tensor has one scale, of its largest element then and there. Operands of the forward product and weights are e4m3,
gradients e5m2. Shape suffixes: N tokens, I inputs, O outputs.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import ScalingType

FORWARD, BACKWARD = torch.float8_e4m3fn, torch.float8_e5m2
MULTIPLE = 16  # of every width of a product


def quantized(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(x / scale in float8, scale): float32, shape []. The largest element becomes the largest that there is."""
    most = torch.finfo(dtype).max
    scale = x.abs().amax().to(torch.float32).clamp_min(torch.finfo(torch.float32).tiny * most) / most
    return (x.to(torch.float32) / scale).clamp(-most, most).to(dtype), scale


def product(a_NI: tuple[Tensor, Tensor], b_OI: tuple[Tensor, Tensor], dtype: torch.dtype) -> Tensor:
    """a b^T, [N, O]: both lie row by row, as the product takes them."""
    (a, a_scale), (b, b_scale) = a_NI, b_OI
    each = ScalingType.TensorWise
    return F.scaled_mm(a.contiguous(), b.contiguous().t(), a_scale, each, b_scale, each, output_dtype=dtype)


class _Float8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_NI: Tensor, weight_OI: Tensor) -> Tensor:
        ctx.save_for_backward(x_NI, weight_OI)
        return product(quantized(x_NI, FORWARD), quantized(weight_OI, FORWARD), x_NI.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x_NI, weight_OI = ctx.saved_tensors
        grad_NO, grad_scale = quantized(grads[0], BACKWARD)
        x8_NI, x_scale = quantized(x_NI, FORWARD)
        weight8_OI, weight_scale = quantized(weight_OI, FORWARD)
        dx_NI = product((grad_NO, grad_scale), (weight8_OI.t(), weight_scale), x_NI.dtype)
        dweight_OI = product((grad_NO.t(), grad_scale), (x8_NI.t(), x_scale), weight_OI.dtype)
        return dx_NI, dweight_OI


def float8_linear(x_NI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """`F.linear` with products of float8, in the type of x. Widths that are no multiples of 16, which the products do
    not take, go by `F.linear`; tokens are filled up to one."""
    if any(width % MULTIPLE for width in weight_OI.shape):
        return F.linear(x_NI, weight_OI, bias_O)
    rows_NI = x_NI.reshape(-1, x_NI.shape[-1])
    filled_NI = F.pad(rows_NI, (0, 0, 0, -len(rows_NI) % MULTIPLE))
    out_NO: Tensor = _Float8Linear.apply(filled_NI, weight_OI)  # type: ignore[assignment]
    out_NO = out_NO[: len(rows_NI)].view(*x_NI.shape[:-1], len(weight_OI))
    return out_NO if bias_O is None else out_NO + bias_O
