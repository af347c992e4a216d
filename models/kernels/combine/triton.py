"""Picks of experts put together by Triton kernels: each token gathers its own rows, so that nothing is scattered.

With P picks the forward pass must move (P + N) D elements, the backward pass (2 P + N) D; with what is free N D and
2 N D more.
Shape suffixes: N tokens, D width, K picks of a token, P picks that are made, C constants.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.kernels.combine.reference import Free
from models.kernels.opaque import shaped_by
from models.kernels.wide import wide

HELD = 1024  # channels that a program holds


@triton.jit
def combine_kernel(
    y, weights, places, x, own, take, value, out, width, TOP: tl.constexpr, CONSTANTS: tl.constexpr,
    BLOCK: tl.constexpr, WIDE: tl.constexpr, FREE: tl.constexpr,
):  # fmt: skip
    """places: of each pick's row in y, -1 for none. FREE: x, own, take and value are there."""
    token = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < width
    total = tl.zeros([BLOCK], WIDE)
    if FREE:
        row = tl.load(x + token * width + channel, mask=inside, other=0.0).to(WIDE)
        total += tl.load(own + token).to(WIDE) * row
        for c in tl.static_range(CONSTANTS):
            row = tl.load(value + c * width + channel, mask=inside, other=0.0).to(WIDE)
            total += tl.load(take + token * CONSTANTS + c).to(WIDE) * row
    for k in range(TOP):
        place = tl.load(places + token * TOP + k)
        row = tl.load(y + place * width + channel, mask=channel < tl.where(place < 0, 0, width), other=0.0).to(WIDE)
        total += tl.load(weights + token * TOP + k).to(WIDE) * row
    tl.store(out + token * width + channel, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def combine_backward_kernel(
    y, weights, places, x, own, value, grad, dy, dweights, dx, down, dtake, width, TOP: tl.constexpr,
    CONSTANTS: tl.constexpr, PICKS: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
    FREE: tl.constexpr,
):  # fmt: skip
    """PICKS, PADDED: TOP and CONSTANTS, to powers of 2."""
    token = tl.program_id(0).to(tl.int64)
    pick, constant = tl.arange(0, PICKS), tl.arange(0, PADDED)
    of_weights, of_take = tl.zeros([PICKS], WIDE), tl.zeros([PADDED], WIDE)
    of_own = tl.zeros([BLOCK], WIDE)
    for start in range(0, width, BLOCK):
        channel = start + tl.arange(0, BLOCK)
        inside = channel < width
        g = tl.load(grad + token * width + channel, mask=inside, other=0.0).to(WIDE)
        if FREE:
            of_own += g * tl.load(x + token * width + channel, mask=inside, other=0.0).to(WIDE)
            share = tl.load(own + token).to(WIDE)
            tl.store(dx + token * width + channel, (share * g).to(dx.dtype.element_ty), mask=inside)
            for c in tl.static_range(CONSTANTS):
                row = tl.load(value + c * width + channel, mask=inside, other=0.0).to(WIDE)
                of_take += tl.where(constant == c, tl.sum(g * row, axis=0), 0.0)
        for k in range(TOP):
            place = tl.load(places + token * TOP + k)
            made = channel < tl.where(place < 0, 0, width)
            row = tl.load(y + place * width + channel, mask=made, other=0.0).to(WIDE)
            of_weights += tl.where(pick == k, tl.sum(g * row, axis=0), 0.0)
            weight = tl.load(weights + token * TOP + k).to(WIDE)
            tl.store(dy + place * width + channel, (weight * g).to(dy.dtype.element_ty), mask=made)
    tl.store(dweights + token * TOP + pick, of_weights, mask=pick < TOP)
    if FREE:
        tl.store(dtake + token * CONSTANTS + constant, of_take, mask=constant < CONSTANTS)
        tl.store(down + token, tl.sum(of_own, axis=0))


def out_shape(operands: list[Tensor]) -> Tensor:
    y_PD, weights_NK = operands[:2]
    return y_PD.new_empty(len(weights_NK), y_PD.shape[1])


@shaped_by(out_shape)
def forward(operands: list[Tensor]) -> Tensor:
    """operands: y [P, D], weights [N, K], places [N, K], and where there is something free x [N, D], own [N, 1],
    take [N, C], value [C, D]."""
    out_ND = out_shape(operands)
    operands, flags = launched(operands)
    (tokens, width), size = out_ND.shape, flags["BLOCK"]
    if tokens:
        combine_kernel[(tokens, triton.cdiv(width, size))](*operands, out_ND, width, **flags)
    return out_ND


def gradient_shapes(operands: list[Tensor], grad_ND: Tensor) -> list[Tensor]:
    y_PD, weights_NK, _, *free = operands
    likes = (y_PD, weights_NK, *free[:3])
    return [torch.empty_like(like, memory_format=torch.contiguous_format) for like in likes]


@shaped_by(gradient_shapes)
def backward(operands: list[Tensor], grad_ND: Tensor) -> list[Tensor]:
    """Of y and weights, and of x, own and take."""
    made = gradient_shapes(operands, grad_ND)
    (y_PD, weights_NK, places_NK, x_ND, own_N1, _, value_CD), flags = launched(operands)
    if len(grad_ND):
        combine_backward_kernel[(len(grad_ND),)](
            *(y_PD, weights_NK, places_NK, x_ND, own_N1, value_CD, grad_ND.contiguous()),
            *made,
            *[y_PD] * (5 - len(made)),
            grad_ND.shape[1],
            PICKS=triton.next_power_of_2(flags["TOP"]),
            PADDED=triton.next_power_of_2(max(1, flags["CONSTANTS"])),
            **flags,
        )
    return made


def launched(operands: list[Tensor]) -> tuple[list[Tensor], dict[str, Any]]:
    """All seven operands, and what both kernels are compiled for."""
    y_PD, weights_NK, places_NK, *free = (operand.contiguous() for operand in operands)
    flags = {
        "TOP": weights_NK.shape[1],
        "CONSTANTS": free[2].shape[1] if free else 0,
        "BLOCK": min(triton.next_power_of_2(y_PD.shape[1]), HELD),
        "WIDE": wide(y_PD.dtype),
        "FREE": bool(free),
    }
    # What is not there is not read: anything stands for it.
    return [y_PD, weights_NK, places_NK, *(free or [y_PD] * 4)], flags


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *operands: Tensor) -> Tensor:
        ctx.save_for_backward(*operands)
        return forward(list(operands))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        operands = list(ctx.saved_tensors)
        dy_PD, dweights_NK, *of_free = backward(operands, grads[0])
        if not of_free:
            return dy_PD, dweights_NK, None
        *_, take_NC, value_CD = operands
        dvalue_CD = take_NC.mT @ grads[0].to(take_NC.dtype)
        return dy_PD, dweights_NK, None, *of_free, dvalue_CD.to(value_CD.dtype)


def combine(y_PD: Tensor, weights_NK: Tensor, places_NK: Tensor, free: Free | None = None) -> Tensor:
    """See `models.kernels.combine.reference`."""
    return _Combine.apply(y_PD, weights_NK, places_NK, *(free or ()))  # type: ignore[return-value]
