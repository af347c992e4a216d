"""RMSNorm with its derivative written out, for CPUs, where torch differentiates a chain of whole-tensor operations.

`F.rms_norm` is the plain reference. Shape suffixes: N tokens, D width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """`x * weight / sqrt(mean(x^2) + eps)` over the last dimension, computed in at least float32, in the type of x."""
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.rms_norm(x, x.shape[-1:], weight_D, eps)
    return _RMSNorm.apply(x, weight_D, eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        x_ND = x.reshape(-1, x.shape[-1])
        wide_ND = x_ND.to(wide)
        square_N1 = torch.linalg.vector_norm(wide_ND, dim=-1, keepdim=True).square_()
        scale_N1 = square_N1.div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x_ND, weight_D, scale_N1)
        return (wide_ND * scale_N1).mul_(weight_D.to(wide)).to(x.dtype).view(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x_ND, weight_D, scale_N1 = ctx.saved_tensors
        wide = scale_N1.dtype
        w_D, grad_ND = weight_D.to(wide), grad.reshape(x_ND.shape)
        # A copy where the types agree, since what follows is in place.
        wide_ND, dx_ND = x_ND.to(wide), grad_ND.to(wide, copy=True)
        product_ND = wide_ND * dx_ND
        dweight_D = scale_N1[:, 0] @ product_ND
        shrink_N1 = (product_ND @ w_D)[:, None] * scale_N1.pow(3) / x_ND.shape[-1]
        dx_ND.mul_(w_D).mul_(scale_N1).addcmul_(wide_ND, shrink_N1, value=-1)
        return dx_ND.to(x_ND.dtype).view(grad.shape), dweight_D.to(weight_D.dtype), None
