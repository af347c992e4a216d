"""Picks of experts put together by Triton kernels: each token gathers its own rows, so that nothing is scattered.

With P picks the forward pass must move (P + 2 N) D elements, the backward pass (2 P + 3 N) D.
Shape suffixes: N tokens, D width, K picks of a token, P picks that are made, C constants.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.kernels.opaque import shaped_by
from models.kernels.picks import Picks
from models.kernels.wide import wide

HELD = 1024  # channels that a program holds


@triton.jit
def combine_kernel(
    y, places, weights, x, own, take, value, out, width, TOP: tl.constexpr, CONSTANTS: tl.constexpr,
    BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """places: of each pick's row in y, -1 for none."""
    token = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < width
    total = tl.load(own + token).to(WIDE) * tl.load(x + token * width + channel, mask=inside, other=0.0).to(WIDE)
    for c in tl.static_range(CONSTANTS):
        constant = tl.load(value + c * width + channel, mask=inside, other=0.0).to(WIDE)
        total += tl.load(take + token * CONSTANTS + c).to(WIDE) * constant
    for k in tl.static_range(TOP):
        place = tl.load(places + token * TOP + k)
        row = tl.load(y + place * width + channel, mask=channel < tl.where(place < 0, 0, width), other=0.0).to(WIDE)
        total += tl.load(weights + token * TOP + k).to(WIDE) * row
    tl.store(out + token * width + channel, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def combine_backward_kernel(
    y, places, weights, x, own, value, grad, dy, dweights, dx, down, dtake, width, TOP: tl.constexpr,
    CONSTANTS: tl.constexpr, PICKS: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """PICKS, PADDED: TOP and CONSTANTS, to powers of 2."""
    token = tl.program_id(0).to(tl.int64)
    pick, constant = tl.arange(0, PICKS), tl.arange(0, PADDED)
    of_weights, of_take = tl.zeros([PICKS], WIDE), tl.zeros([PADDED], WIDE)
    of_own = tl.zeros([BLOCK], WIDE)
    share = tl.load(own + token).to(WIDE)
    for start in range(0, width, BLOCK):
        channel = start + tl.arange(0, BLOCK)
        inside = channel < width
        g = tl.load(grad + token * width + channel, mask=inside, other=0.0).to(WIDE)
        of_own += g * tl.load(x + token * width + channel, mask=inside, other=0.0).to(WIDE)
        tl.store(dx + token * width + channel, (share * g).to(dx.dtype.element_ty), mask=inside)
        for c in tl.static_range(CONSTANTS):
            row = tl.load(value + c * width + channel, mask=inside, other=0.0).to(WIDE)
            of_take += tl.where(constant == c, tl.sum(g * row, axis=0), 0.0)
        for k in tl.static_range(TOP):
            place = tl.load(places + token * TOP + k)
            made = channel < tl.where(place < 0, 0, width)
            row = tl.load(y + place * width + channel, mask=made, other=0.0).to(WIDE)
            of_weights += tl.where(pick == k, tl.sum(g * row, axis=0), 0.0)
            weight = tl.load(weights + token * TOP + k).to(WIDE)
            tl.store(dy + place * width + channel, (weight * g).to(dy.dtype.element_ty), mask=made)
    tl.store(dweights + token * TOP + pick, of_weights, mask=pick < TOP)
    tl.store(dtake + token * CONSTANTS + constant, of_take, mask=constant < CONSTANTS)
    tl.store(down + token, tl.sum(of_own, axis=0))


def out_shape(operands: list[Tensor]) -> Tensor:
    return torch.empty_like(operands[3], memory_format=torch.contiguous_format)


@shaped_by(out_shape)
def forward(operands: list[Tensor]) -> Tensor:
    """operands: y [P, D], places [N, K], weights [N, K], x [N, D], own [N, 1], take [N, C], value [C, D]."""
    operands = [operand.contiguous() for operand in operands]
    _, _, weights_NK, x_ND, _, take_NC, _ = operands
    out_ND = out_shape(operands)
    (tokens, width), size = x_ND.shape, block_of(x_ND)
    if tokens:
        combine_kernel[(tokens, triton.cdiv(width, size))](
            *operands,
            out_ND,
            width,
            TOP=weights_NK.shape[1],
            CONSTANTS=take_NC.shape[1],
            BLOCK=size,
            WIDE=wide(x_ND.dtype),
        )
    return out_ND


def gradient_shapes(operands: list[Tensor], grad_ND: Tensor) -> list[Tensor]:
    y_PD, _, weights_NK, x_ND, own_N1, take_NC, _ = operands
    likes = (y_PD, weights_NK, x_ND, own_N1, take_NC)
    return [torch.empty_like(like, memory_format=torch.contiguous_format) for like in likes]


@shaped_by(gradient_shapes)
def backward(operands: list[Tensor], grad_ND: Tensor) -> list[Tensor]:
    """Of y, weights, x, own and take."""
    operands = [operand.contiguous() for operand in operands]
    y_PD, places_NK, weights_NK, x_ND, own_N1, take_NC, value_CD = operands
    made = gradient_shapes(operands, grad_ND)
    top, constants = weights_NK.shape[1], take_NC.shape[1]
    if len(x_ND):
        combine_backward_kernel[(len(x_ND),)](
            *(y_PD, places_NK, weights_NK, x_ND, own_N1, value_CD, grad_ND.contiguous()),
            *made,
            x_ND.shape[1],
            TOP=top,
            CONSTANTS=constants,
            PICKS=triton.next_power_of_2(top),
            PADDED=triton.next_power_of_2(max(1, constants)),
            BLOCK=block_of(x_ND),
            WIDE=wide(x_ND.dtype),
        )
    return made


def block_of(x_ND: Tensor) -> int:
    return min(triton.next_power_of_2(x_ND.shape[1]), HELD)


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *operands: Tensor) -> Tensor:
        ctx.save_for_backward(*operands)
        return forward(list(operands))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        dy_PD, dweights_NK, dx_ND, down_N1, dtake_NC = backward(list(ctx.saved_tensors), grads[0])
        *_, take_NC, value_CD = ctx.saved_tensors
        dvalue_CD = take_NC.mT @ grads[0].to(take_NC.dtype)
        return dy_PD, None, dweights_NK, dx_ND, down_N1, dtake_NC, dvalue_CD.to(value_CD.dtype)


def combine(
    y_PD: Tensor,
    weights_NK: Tensor,
    picks: Picks | None,
    x_ND: Tensor,
    own_N1: Tensor,
    take_NC: Tensor,
    value_CD: Tensor,
) -> Tensor:
    """See `models.kernels.combine.reference`."""
    order_P = torch.arange(len(y_PD), device=y_PD.device)
    if picks is None:
        places_NK = order_P.view(weights_NK.shape)
    else:
        places_NK = torch.full_like(weights_NK, -1, dtype=torch.int64)
        places_NK[picks.token_P, picks.pick_P] = order_P
    return _Combine.apply(y_PD, places_NK, weights_NK, x_ND, own_N1, take_NC, value_CD)  # type: ignore[return-value]
