"""Triton kernels of weighted sums of rows: Y_c = sum_j w[c, j] X_j for every token, over any number of rows that lie
anywhere. One read of the rows makes all sums, and one more all gradients.

With J rows and C sums of N tokens the forward pass must move (J + C) N D elements, the backward pass (2 J + C) N D.
Shape suffixes: N tokens, D width, C sums, J rows, K blocks of D.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from models.kernels.wide import wide

ALIGNMENT = 16  # bytes that a thread loads at once
HELD = 4096  # elements of all sums that a program holds


@triton.jit
def at(table, row, rows, token, like, UNIT: tl.constexpr):
    """Where a row of a token begins. table: addresses, then distances from token to token in UNITs of elements. like:
    a tensor of the rows' type."""
    base = tl.load(table + row).to(like.dtype)
    if UNIT > 1:
        # Nothing else is known of the address, and loads would go by single elements.
        base = tl.multiple_of(base, 16)
    return base + token * tl.load(table + rows + row) * UNIT


@triton.jit
def mix_kernel(
    table, outs, w, w_stride, like, width, rows, WAYS: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr,
    UNIT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One token's block of channels of every sum. PADDED: WAYS, to a power of 2."""
    token = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    way = tl.arange(0, PADDED)
    inside = channel < width
    out = tl.zeros([PADDED, BLOCK], WIDE)
    for j in range(rows):
        x = tl.load(at(table, j, rows, token, like, UNIT) + channel, mask=inside, other=0.0).to(WIDE)
        weight = tl.load(w + token * w_stride + way * rows + j, mask=way < WAYS, other=0.0).to(WIDE)
        out += weight[:, None] * x[None, :]
    for c in tl.static_range(WAYS):
        row = tl.sum(tl.where(way[:, None] == c, out, 0.0), axis=0)
        tl.store(at(outs, c, WAYS, token, like, UNIT) + channel, row.to(like.dtype.element_ty), mask=inside)


@triton.jit
def mix_backward_kernel(
    table, grads, gradients, dw, w, w_stride, like, width, rows, WAYS: tl.constexpr, PADDED: tl.constexpr,
    BLOCK: tl.constexpr, UNIT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One token's block of channels of every row's gradient, and that block's share of the weights'. grads: of the
    sums. gradients: of the rows, written here."""
    token, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    channel = part * BLOCK + tl.arange(0, BLOCK)
    way = tl.arange(0, PADDED)
    inside = channel < width
    grad = tl.zeros([PADDED, BLOCK], WIDE)
    for c in tl.static_range(WAYS):
        row = tl.load(at(grads, c, WAYS, token, like, UNIT) + channel, mask=inside, other=0.0).to(WIDE)
        grad = tl.where(way[:, None] == c, row[None, :], grad)
    share = dw + (token * tl.num_programs(1) + part) * WAYS * rows + way * rows
    for j in range(rows):
        x = tl.load(at(table, j, rows, token, like, UNIT) + channel, mask=inside, other=0.0).to(WIDE)
        tl.store(share + j, tl.sum(grad * x[None, :], axis=1), mask=way < WAYS)
        weight = tl.load(w + token * w_stride + way * rows + j, mask=way < WAYS, other=0.0).to(WIDE)
        dx = tl.sum(weight[:, None] * grad, axis=0)
        tl.store(at(gradients, j, rows, token, like, UNIT) + channel, dx.to(like.dtype.element_ty), mask=inside)


def mix(w_NCJ: Tensor, rows: list[Tensor], outs: list[Tensor]) -> None:
    """Write the sums to `outs`. w: [N, C, J], or [C, J] for all tokens. rows, outs: J and C of [N, D], of one type,
    whose channels lie side by side."""
    launch(mix_kernel, w_NCJ, [rows, outs])


def mix_backward(w_NCJ: Tensor, rows: list[Tensor], grads: list[Tensor], gradients: list[Tensor]) -> Tensor:
    """Write the gradients of the rows to `gradients`, given those of the sums. Returns that of w, at least float32."""
    dw_NKCJ = by_block(w_NCJ, rows[0])
    launch(mix_backward_kernel, w_NCJ, [rows, grads, gradients], dw_NKCJ)
    return dw_NKCJ.sum(1) if w_NCJ.dim() == 3 else dw_NKCJ.sum((0, 1))


def by_block(w_NCJ: Tensor, like_ND: Tensor) -> Tensor:
    (tokens, width), (ways, rows) = like_ND.shape, w_NCJ.shape[-2:]
    blocks = triton.cdiv(width, block_of(ways, width))
    return w_NCJ.new_empty(tokens, blocks, ways, rows, dtype=weight_type(w_NCJ, like_ND))


def weight_type(w: Tensor, like: Tensor) -> torch.dtype:
    """Of the weights' gradient."""
    return torch.promote_types(torch.promote_types(w.dtype, like.dtype), torch.float32)


def block_of(ways: int, width: int) -> int:
    return min(triton.next_power_of_2(width), HELD // triton.next_power_of_2(ways))


def launch(kernel: Any, w_NCJ: Tensor, operands: list[list[Tensor]], *made: Tensor) -> None:
    like = operands[0][0]
    (tokens, width), (ways, rows) = like.shape, w_NCJ.shape[-2:]
    if not tokens or not width:
        return
    every = [x for group in operands for x in group]
    assert all(x.stride(1) == 1 and x.dtype == like.dtype and x.shape == like.shape for x in every)
    unit = ALIGNMENT // like.element_size()
    if any(x.data_ptr() % ALIGNMENT or x.stride(0) % unit for x in every):
        unit = 1
    size = block_of(ways, width)
    kernel[(tokens, triton.cdiv(width, size))](
        *tables(operands, unit),
        *made,
        w_NCJ.contiguous(),
        ways * rows if w_NCJ.dim() == 3 else 0,
        like,
        width,
        rows,
        WAYS=ways,
        PADDED=triton.next_power_of_2(ways),
        BLOCK=size,
        UNIT=unit,
        WIDE=wide(w_NCJ.dtype, like.dtype),
    )


def tables(operands: list[list[Tensor]], unit: int) -> tuple[Tensor, ...]:
    """A table for each group of tensors, on their device: see `at`."""
    numbers = [n for group in operands for n in (*(x.data_ptr() for x in group), *(x.stride(0) // unit for x in group))]
    table = torch.tensor(numbers, dtype=torch.int64)
    device = operands[0][0].device
    if device.type != "cpu":
        table = table.pin_memory().to(device, non_blocking=True)
    return table.split([2 * len(group) for group in operands])
