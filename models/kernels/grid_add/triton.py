"""A step of a stream on the grid, and the norm behind it, by Triton kernels that read and write each element once.

With A tensors added to a stream of N D elements and a norm behind them, the forward pass must move (A + 3) N D, the
backward pass 5 N D; of a norm alone 2 and 3.
Shape suffixes: N tokens, D width, K programs.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.kernels.opaque import shaped_by
from models.kernels.wide import wide
from models.params import RMSNorm

NO_GRID = -1
PROGRAMS = 1024  # of the backward pass, each with a share of the weight's gradient
LANES = 512  # elements of a row to a warp


@triton.jit
def rounded(x, WIDE: tl.constexpr):
    """To the nearest integer, ties to even: a float of this size has no digits behind the point."""
    if WIDE == tl.float64:
        whole = 4503599627370496.0
    else:
        whole = 8388608.0
    size = tl.abs(x)
    near = (size + whole) - whole
    near = tl.where(size < whole, near, size)
    return tl.where(x < 0, -near, near)


@triton.jit
def add_kernel(
    x, first, second, weight, out, normed, scales, width, grid, point, eps, FACTOR: tl.constexpr, ADDED: tl.constexpr,
    NORM: tl.constexpr, ON_GRID: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One token. grid, point: steps of the grid to 1, and its inverse. FACTOR: numbers would come in float32."""
    token = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    inside = d < width
    place = token * width + d
    total = tl.load(x + place, mask=inside, other=0.0).to(WIDE)
    if ADDED > 0:
        added = tl.load(first + place, mask=inside, other=0.0).to(WIDE)
        if ADDED > 1:
            added += tl.load(second + place, mask=inside, other=0.0).to(WIDE)
        added *= FACTOR
        if ON_GRID:
            added = rounded(added * grid, WIDE) * point
        stored = (total + added).to(out.dtype.element_ty)
        tl.store(out + place, stored, mask=inside)
        total = stored.to(WIDE)
    if NORM:
        scale = 1.0 / tl.sqrt(tl.sum(total * total, axis=0) / width + eps)
        tl.store(scales + token, scale)
        total *= scale * tl.load(weight + d, mask=inside, other=0.0).to(WIDE)
        tl.store(normed + place, total.to(normed.dtype.element_ty), mask=inside)


@triton.jit
def add_backward_kernel(
    out, weight, scales, dout, dnormed, dx, dadded, dweight, tokens, width, FACTOR: tl.constexpr, ADDED: tl.constexpr,
    BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Every so many tokens. dout: what comes to the sum from elsewhere, where something was added. dadded: of each of
    what was."""
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    d = tl.arange(0, BLOCK)
    inside = d < width
    w = tl.load(weight + d, mask=inside, other=0.0).to(WIDE)
    share = tl.zeros([BLOCK], WIDE)
    for token in range(program, tokens, programs):
        place = token * width + d
        scale = tl.load(scales + token)
        unit = tl.load(out + place, mask=inside, other=0.0).to(WIDE) * scale
        g = tl.load(dnormed + place, mask=inside, other=0.0).to(WIDE)
        share += g * unit
        g *= w
        total = scale * (g - unit * (tl.sum(g * unit, axis=0) / width))
        if ADDED:
            total += tl.load(dout + place, mask=inside, other=0.0).to(WIDE)
            tl.store(dadded + place, (FACTOR * total).to(dadded.dtype.element_ty), mask=inside)
        tl.store(dx + place, total.to(dx.dtype.element_ty), mask=inside)
    tl.store(dweight + program * width + d, share, mask=inside)


def sum_type(operands: list[Tensor], added: int, bits: int) -> torch.dtype:
    """As plain torch has it: what is put on a grid is at least float32."""
    dtype = operands[0].dtype
    for x_ND in operands[1 : 1 + added]:
        least = x_ND.dtype if bits == NO_GRID else torch.promote_types(x_ND.dtype, torch.float32)
        dtype = torch.promote_types(dtype, least)
    return dtype


def shapes(operands: list[Tensor], added: int, factor: float, bits: int, eps: float) -> list[Tensor]:
    x_ND, dtype = operands[0], sum_type(operands, added, bits)
    made = [x_ND.new_empty(x_ND.shape, dtype=dtype)] if added else []
    if len(operands) > 1 + added:
        scale_type = torch.promote_types(dtype, torch.float32)
        made += [x_ND.new_empty(x_ND.shape, dtype=operands[-1].dtype), x_ND.new_empty(len(x_ND), dtype=scale_type)]
    return made


@shaped_by(shapes)
def forward(operands: list[Tensor], added: int, factor: float, bits: int, eps: float) -> list[Tensor]:
    """operands: x [N, D], what is `added`, one or two of its shape, and the norm's weight [D], if there is one. bits:
    NO_GRID for none. Returns the sum, if something is added, and with a weight the normed and each token's scale."""
    operands = [operand.contiguous() for operand in operands]
    x_ND, *rest = operands
    made, norm = shapes(operands, added, factor, bits, eps), len(operands) > 1 + added
    (tokens, width), first = x_ND.shape, rest[0] if added else x_ND
    if tokens:
        out_ND = made[0] if added else x_ND
        normed_ND, scale_N = made[-2:] if norm else (x_ND, x_ND)
        add_kernel[(tokens,)](
            *(x_ND, first, rest[1] if added > 1 else first, operands[-1], out_ND, normed_ND, scale_N, width),
            *(2.0**bits, 2.0**-bits, eps),
            FACTOR=factor,
            ADDED=added,
            NORM=norm,
            ON_GRID=bits != NO_GRID,
            BLOCK=triton.next_power_of_2(width),
            WIDE=wide(out_ND.dtype),
            num_warps=warps(width),
        )
    return made


def gradient_shapes(operands: list[Tensor], added_type: torch.dtype | None, factor: float) -> list[Tensor]:
    out_ND, weight_D, scale_N = operands[:3]
    programs = max(1, min(PROGRAMS, len(out_ND)))
    dweight_KD = scale_N.new_empty(programs, weight_D.shape[0])
    of_added = [] if added_type is None else [out_ND.new_empty(out_ND.shape, dtype=added_type)]
    return [torch.empty_like(out_ND, memory_format=torch.contiguous_format), dweight_KD, *of_added]


@shaped_by(gradient_shapes)
def backward(operands: list[Tensor], added_type: torch.dtype | None, factor: float) -> list[Tensor]:
    """operands: the sum [N, D], the weight [D], the scales [N], the gradient of the normed and, where something was
    added, of the sum. Returns those of x, of the weight in parts [K, D], and of what was added, which is of this type.
    """
    made = gradient_shapes(operands, added_type, factor)
    out_ND, weight_D, scale_N, dnormed_ND, *rest = (operand.contiguous() for operand in operands)
    dx_ND, dweight_KD, *of_added = made
    if not len(out_ND):
        dweight_KD.zero_()
        return made
    # What is not there is not read: anything stands for it.
    add_backward_kernel[(len(dweight_KD),)](
        *(out_ND, weight_D, scale_N, *(rest or [dnormed_ND]), dnormed_ND, dx_ND, *(of_added or [dx_ND]), dweight_KD),
        *out_ND.shape,
        FACTOR=factor,
        ADDED=bool(of_added),
        BLOCK=triton.next_power_of_2(out_ND.shape[1]),
        WIDE=wide(out_ND.dtype),
        num_warps=warps(out_ND.shape[1]),
    )
    return made


def warps(width: int) -> int:
    return max(1, min(16, triton.next_power_of_2(width) // LANES))


class _GridAdd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, numbers: tuple[int, float, int, float], *operands: Tensor) -> tuple[Tensor, ...]:
        made = forward(list(operands), *numbers)
        ctx.numbers, ctx.types = numbers, [operand.dtype for operand in operands]
        if len(operands) > 1 + numbers[0]:
            ctx.save_for_backward(made[0] if numbers[0] else operands[0], operands[-1], made.pop())
        return tuple(made)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (added, factor, *_), types = ctx.numbers, ctx.types
        if not ctx.saved_tensors:
            return None, grads[0].to(types[0]), *((factor * grads[0]).to(dtype) for dtype in types[1:])
        out_ND, weight_D, scale_N = ctx.saved_tensors
        operands = [out_ND, weight_D, scale_N, grads[-1], *grads[:-1]]
        dx_ND, dweight_KD, *of_added = backward(operands, types[1] if added else None, factor)
        of_added = [of_added[0].to(dtype) for dtype in types[1 : 1 + added]]
        return None, dx_ND.to(types[0]), *of_added, dweight_KD.sum(0).to(weight_D.dtype)


def grid_add(
    x_D: Tensor, added: tuple[Tensor, ...], factor: float, bits: int | None, norm: RMSNorm | None
) -> tuple[Tensor, Tensor | None]:
    """See `models.kernels.grid_add.reference`; at most two tensors are added. Their sum is in float32 at least."""
    if not added and norm is None:
        return x_D, None
    rows, weights = [x.flatten(0, -2) for x in (x_D, *added)], [] if norm is None else [norm.weight]
    numbers = (len(added), factor, NO_GRID if bits is None else bits, 0.0 if norm is None else norm.eps)
    made: tuple[Tensor, ...] = _GridAdd.apply(numbers, *rows, *weights)  # type: ignore[assignment]
    shaped = [out_ND.view(x_D.shape) for out_ND in made]
    return shaped[0] if added else x_D, None if norm is None else shaped[-1]
