"""RMSNorm with its derivative written out, for CPUs, where torch differentiates a chain of whole-tensor operations.

`F.rms_norm` is the reference. Shape suffixes: N tokens, D width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.kernels.blocks import row_blocks


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """`x * weight / sqrt(mean(x^2) + eps)` over the last dimension, computed in at least float32.

    Returns the type of the weight, which is that of the computation: a float32 stream goes into a bfloat16 branch.
    """
    return (rms_norm_rows if x.device.type == "cpu" else rms_norm_torch)(x, weight_D, eps)


def rms_norm_torch(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight_D.to(x.dtype), eps).to(weight_D.dtype)


def rms_norm_rows(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """By blocks of rows, with a derivative of its own, but in what is compiled: there a compiler writes both out."""
    if torch.compiler.is_compiling():
        return rms_norm_torch(x, weight_D, eps)
    return _RMSNorm.apply(x, weight_D, eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        x_ND, w_D = x.reshape(-1, x.shape[-1]), weight_D.to(wide)
        out_ND = torch.empty_like(x_ND, dtype=weight_D.dtype)
        scale_N1 = x_ND.new_empty(x_ND.shape[0], 1, dtype=wide)
        for block in row_blocks(x_ND):
            # A copy where the types agree, since what follows is in place.
            wide_ND = x_ND[block].to(wide, copy=True)
            square_N1 = torch.linalg.vector_norm(wide_ND, dim=-1, keepdim=True).square_()
            scale_N1[block] = square_N1.div_(x.shape[-1]).add_(eps).rsqrt_()
            out_ND[block] = wide_ND.mul_(scale_N1[block]).mul_(w_D)
        ctx.save_for_backward(x_ND, weight_D, scale_N1)
        return out_ND.view(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x_ND, weight_D, scale_N1 = ctx.saved_tensors
        wide = scale_N1.dtype
        w_D, grad_ND = weight_D.to(wide), grad.reshape(x_ND.shape)
        dx_ND, dweight_D = torch.empty_like(x_ND), torch.zeros_like(w_D)
        for block in row_blocks(x_ND):
            wide_ND, d_ND = x_ND[block].to(wide), grad_ND[block].to(wide, copy=True)
            own_N1 = scale_N1[block]
            product_ND = wide_ND * d_ND
            dweight_D += own_N1[:, 0] @ product_ND
            shrink_N1 = (product_ND @ w_D)[:, None] * own_N1.pow(3) / x_ND.shape[-1]
            dx_ND[block] = d_ND.mul_(w_D).mul_(own_N1).addcmul_(wide_ND, shrink_N1, value=-1)
        return dx_ND.view(grad.shape), dweight_D.to(weight_D.dtype), None
