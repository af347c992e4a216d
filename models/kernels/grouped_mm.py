"""Grouped matrix product: consecutive groups of rows, each times a matrix of its own.

Shape suffixes: M rows, K and N inner and outer width, E groups.
"""

from collections.abc import Callable
from types import MappingProxyType
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from models.kernels.in_float32 import Widening
from models.kernels.of_libraries import Library
from models.kernels.op import FLOAT32
from models.kernels.opaque import opaque, varying

ALIGNMENT = 16  # bytes: what F.grouped_mm asks of every row


def grouped_mm(a_MK: Tensor, b_EKN: Tensor, counts_E: Tensor) -> Tensor:
    """`out[m] = a[m] @ b[e]`, where e is the group of row m. Returns [M, N].

    counts_E: rows of each group (integers, sum M); the rows of group 0 come first. Groups may be empty, and M may be 0.
    By `grouped_mm_torch` for types below float64 whose rows are multiples of 16 bytes, otherwise by `grouped_mm_loop`.
    """
    aligned = a_MK.dtype != torch.float64 and not any(short(width, a_MK.dtype) for width in b_EKN.shape[1:])
    return (grouped_mm_torch if aligned else grouped_mm_loop)(a_MK, b_EKN, counts_E)


def short(width: int, dtype: torch.dtype) -> int:
    """Elements that a row of this width lacks to what F.grouped_mm takes."""
    return -width % (ALIGNMENT // dtype.itemsize)


def grouped_mm_torch(a_MK: Tensor, b_EKN: Tensor, counts_E: Tensor) -> Tensor:
    """One fused call, without waiting for the device, below float64. Ranks may share out a width in parts that are
    not multiples of 16 bytes, which get zeros behind them."""
    return fused(a_MK, b_EKN, counts_E, a_MK.dtype)


def grouped_mm_float32(a_MK: Tensor, b_EKN: Tensor, counts_E: Tensor) -> Tensor:
    """The same with products in float32, rounded to the type of a; kept for the backward pass is what came."""
    return fused(a_MK, b_EKN, counts_E, torch.float32)


def fused(a_MK: Tensor, b_EKN: Tensor, counts_E: Tensor, dtype: torch.dtype) -> Tensor:
    """dtype: of the products."""
    inner, outer = b_EKN.shape[1:]
    missing_K, missing_N = short(inner, dtype), short(outer, dtype)
    if missing_K or missing_N:
        a_MK, b_EKN = F.pad(a_MK, (0, missing_K)), F.pad(b_EKN, (0, missing_N, 0, missing_K))
    ends_E = counts_E.cumsum(0).to(torch.int32)
    out_MN: Tensor = _GroupedMM.apply(a_MK.contiguous(), b_EKN, ends_E, dtype)  # type: ignore[assignment]
    return out_MN[:, :outer] if missing_N else out_MN


def product_shape(a: Tensor, b: Tensor, ends_E: Tensor, dtype: torch.dtype) -> Tensor:
    return a.new_empty(*(() if b.dim() == 3 else ends_E.shape), a.shape[0], b.shape[-1])


def product(a: Tensor, b: Tensor, ends_E: Tensor, dtype: torch.dtype) -> Tensor:
    """[M, K] and [E, K, N] make [M, N]; [K, M] and [M, N] make [E, K, N]."""
    return F.grouped_mm(a.to(dtype), b.to(dtype), offs=ends_E).to(a.dtype)


class _GroupedMM(torch.autograd.Function):
    """A Function, because torch's backward pass refuses gradients with strides of 0, such as those of a sum, and its
    compiler any type but bfloat16, so that it is told of others' shapes alone."""

    opaque_product = staticmethod(opaque(product, product_shape))

    @staticmethod
    def forward(ctx: Any, a_MK: Tensor, b_EKN: Tensor, ends_E: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(a_MK, b_EKN, ends_E)
        ctx.dtype = dtype
        ctx.product = product if dtype == torch.bfloat16 else _GroupedMM.opaque_product
        return ctx.product(a_MK, b_EKN, ends_E, dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        a_MK, b_EKN, ends_E = ctx.saved_tensors
        # One of no rows that was expanded is contiguous to torch, and refused.
        grad_MN = grads[0].contiguous() if len(grads[0]) else grads[0].new_zeros(grads[0].shape)
        da_MK = ctx.product(grad_MN, b_EKN.mT, ends_E, ctx.dtype) if ctx.needs_input_grad[0] else None
        db_EKN = ctx.product(a_MK.mT, grad_MN, ends_E, ctx.dtype) if ctx.needs_input_grad[1] else None
        return da_MK, db_EKN, None, None


def grouped_mm_loop(a_MK: Tensor, b_EKN: Tensor, counts_E: Tensor) -> Tensor:
    """The reference: one matrix product per group. Reads the counts on the host, so it waits for the device, and a
    compiler leaves it alone. On meta, which knows no counts, all rows are of the first group."""
    (out_MN,) = varying(products, a_MK, b_EKN, counts_E)
    return out_MN


def products(a_MK: Tensor, b_EKN: Tensor, counts_E: Tensor) -> tuple[Tensor]:
    counts = [len(a_MK), *[0] * (len(b_EKN) - 1)] if a_MK.is_meta else counts_E.tolist()
    groups = a_MK.split(counts)
    return (torch.cat([rows @ b_KN for rows, b_KN in zip(groups, b_EKN.unbind(), strict=True)]),)


class GroupedMM(Widening, Library):
    """`grouped_mm` with matrices of these inner and outer widths, before ranks share them out."""

    name = "grouped_mm"
    reference: ClassVar[Callable[..., Any]] = staticmethod(grouped_mm_loop)
    automatic: ClassVar[Callable[..., Any]] = staticmethod(grouped_mm)
    implementations = MappingProxyType(
        {"torch": grouped_mm_torch, "loop": grouped_mm_loop, FLOAT32: grouped_mm_float32}
    )

    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.widths = widths

    def order(self, device: torch.device) -> tuple[str, ...]:
        return ("torch", "loop")

    def refusal(self, implementation: str, device: torch.device, dtype: torch.dtype) -> str | None:
        if implementation != "torch":
            return super().refusal(implementation, device, dtype)
        if dtype == torch.float64:
            return "its products are of types below float64"
        for width in self.widths:
            if short(width, dtype):
                return f"its rows are multiples of {ALIGNMENT} bytes, where these have {width * dtype.itemsize}"
        return None
