"""Products of bfloat16 numbers in float32, for processors that multiply those faster.

The numbers are what bfloat16 products give, which add up in float32 too: a product of two bfloat16 numbers is exact
there. Shape suffixes: I inputs, O outputs.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.kernels.op import AUTO, FLOAT32, REFERENCE, Choice, Op


def slow_in_bfloat16(device: torch.device) -> bool:
    """Whether it is a processor without units for products of bfloat16 whose libraries make use of them.

    By what it says of itself, not by the clock: a run that resumes on it gets the same bits. Intel's AVX-512 without
    AMX has such products at half the speed of float32's (docs/experiments.md).
    """
    if device.type != "cpu":
        return False
    has = torch.cpu.get_capabilities()
    avx512 = has.get("avx512_bf16", False) and "AMD" in has.get("cpu_name", "")
    units = has.get("amx_tile", False) or has.get("bf16", False) or avx512
    return not (units and torch.backends.mkldnn.is_available())


class Widening(Op):
    """Has an implementation FLOAT32: products of bfloat16 numbers in float32, which `auto` takes on processors that
    multiply those faster."""

    def order(self, device: torch.device) -> tuple[str, ...]:
        """None that has to be asked for, or that only numbers of bfloat16 can have."""
        return (REFERENCE,)

    def refusal(self, implementation: str, device: torch.device, dtype: torch.dtype) -> str | None:
        if implementation == FLOAT32 and dtype != torch.bfloat16:
            return f"it is for numbers of bfloat16, and this computes in {str(dtype).removeprefix('torch.')}"
        return super().refusal(implementation, device, dtype)

    def choice(self, asked: str, device: torch.device, dtype: torch.dtype, key: str) -> Choice:
        slow = dtype == torch.bfloat16 and slow_in_bfloat16(device)
        return super().choice(FLOAT32 if asked == AUTO and slow else asked, device, dtype, key)


class _Linear(torch.autograd.Function):
    """Keeps x and the weight as they came, not their copies in float32."""

    @staticmethod
    def forward(ctx: Any, x_I: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        ctx.save_for_backward(x_I, weight_OI)
        bias = None if bias_O is None else bias_O.to(torch.float32)
        return F.linear(x_I.to(torch.float32), weight_OI.to(torch.float32), bias).to(x_I.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x_I, weight_OI = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        grad_O = grads[0].to(torch.float32)
        dx_I = (grad_O @ weight_OI.to(torch.float32)).to(x_I.dtype) if needs_x else None
        rows_NO = grad_O.flatten(0, -2)
        dweight_OI = None
        if needs_weight:
            dweight_OI = (rows_NO.mT @ x_I.flatten(0, -2).to(torch.float32)).to(weight_OI.dtype)
        return dx_I, dweight_OI, rows_NO.sum(0).to(weight_OI.dtype) if needs_bias else None


def linear_in_float32(x_I: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """`F.linear`, [..., O], in the type of x."""
    return _Linear.apply(x_I, weight_OI, bias_O)  # type: ignore[return-value]


def operands_in_float32(*operands: Tensor) -> tuple[Tensor, ...]:
    """The same numbers."""
    return tuple(x.to(torch.float32) for x in operands)
