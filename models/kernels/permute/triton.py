"""Tokens' rows in the order of their experts by Triton kernels: each is read once and stored at all its places.

With P picks that are made each pass must move (N + P) D elements.
Shape suffixes: N tokens, D width, K picks of a token, P picks that are made.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.kernels.opaque import shaped_by
from models.kernels.wide import wide

HELD = 1024  # channels that a program holds


@triton.jit
def permute_kernel(x, places, out, width, TOP: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(x + token * width + channel, mask=channel < width)
    for k in range(TOP):
        place = tl.load(places + token * TOP + k)
        tl.store(out + place * width + channel, row, mask=channel < tl.where(place < 0, 0, width))


@triton.jit
def permute_backward_kernel(grad, places, dx, width, TOP: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], WIDE)
    for k in range(TOP):
        place = tl.load(places + token * TOP + k)
        made = channel < tl.where(place < 0, 0, width)
        total += tl.load(grad + place * width + channel, mask=made, other=0.0).to(WIDE)
    tl.store(dx + token * width + channel, total.to(dx.dtype.element_ty), mask=channel < width)


def rows_shape(x_ND: Tensor, places_NK: Tensor, rows: int) -> Tensor:
    return x_ND.new_empty(rows, x_ND.shape[1])


@shaped_by(rows_shape)
def forward(x_ND: Tensor, places_NK: Tensor, rows: int) -> Tensor:
    out_PD = rows_shape(x_ND, places_NK, rows)
    launch(permute_kernel, x_ND, places_NK, out_PD)
    return out_PD


def gradient_shape(grad_PD: Tensor, places_NK: Tensor) -> Tensor:
    return grad_PD.new_empty(len(places_NK), grad_PD.shape[1])


@shaped_by(gradient_shape)
def backward(grad_PD: Tensor, places_NK: Tensor) -> Tensor:
    dx_ND = gradient_shape(grad_PD, places_NK)
    launch(permute_backward_kernel, grad_PD, places_NK, dx_ND, WIDE=wide(grad_PD.dtype))
    return dx_ND


def launch(kernel: Any, source: Tensor, places_NK: Tensor, out: Tensor, **flags: tl.dtype) -> None:
    (tokens, top), width = places_NK.shape, source.shape[1]
    size = min(triton.next_power_of_2(width), HELD)
    if tokens:
        kernel[(tokens, triton.cdiv(width, size))](
            source.contiguous(), places_NK.contiguous(), out, width, TOP=top, BLOCK=size, **flags
        )


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, places_NK: Tensor, rows: int) -> Tensor:
        ctx.save_for_backward(places_NK)
        return forward(x_ND, places_NK, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return backward(grads[0], *ctx.saved_tensors), None, None


def permute(x_ND: Tensor, places_NK: Tensor, rows: int) -> Tensor:
    """See `models.kernels.permute.reference`."""
    return _Permute.apply(x_ND, places_NK, rows)  # type: ignore[return-value]
