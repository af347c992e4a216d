"""Sinkhorn-Knopp as Triton kernels: all iterations on a few small matrices in a program's registers.

The backward pass walks the iterations back by what each of them subtracted, which it makes again first.
Shape suffixes: M matrices, N rows and columns, S = 2 x iterations normalisations.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.kernels.opaque import shaped_by
from models.kernels.wide import wide

HELD = 1024  # elements of all matrices that a program holds


@triton.jit
def subtrahend(logits, AXIS: tl.constexpr):
    """The logarithm of the sum of exponentials; 0 where there are none, in what only fills up a power of 2."""
    largest = tl.max(logits, axis=AXIS, keep_dims=True)
    largest = tl.where(largest == float("-inf"), 0.0, largest)
    total = tl.sum(tl.exp(logits - largest), axis=AXIS, keep_dims=True)
    return largest + tl.log(tl.where(total == 0.0, 1.0, total))


@triton.jit
def places(matrices, size, PER: tl.constexpr, PADDED: tl.constexpr):
    """Offsets into [M, N, N], and which are inside it."""
    matrix = tl.program_id(0).to(tl.int64) * PER + tl.arange(0, PER)[:, None, None]
    row, column = tl.arange(0, PADDED)[None, :, None], tl.arange(0, PADDED)[None, None, :]
    inside = (matrix < matrices) & (row < size) & (column < size)
    return matrix, row, column, (matrix * size + row) * size + column, inside


@triton.jit
def sinkhorn_kernel(
    logits, out, matrices, size, iterations, PER: tl.constexpr, PADDED: tl.constexpr, WIDE: tl.constexpr
):
    _, _, _, at, inside = places(matrices, size, PER, PADDED)
    x = tl.load(logits + at, mask=inside, other=float("-inf")).to(WIDE)
    for _ in range(iterations):
        x -= subtrahend(x, 1)
        x -= subtrahend(x, 2)
    tl.store(out + at, tl.exp(x), mask=inside)


@triton.jit
def sinkhorn_backward_kernel(
    logits, grad, subtracted, dlogits, matrices, size, iterations, PER: tl.constexpr, PADDED: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """subtracted: [M, S, N], to be filled."""
    matrix, row, column, at, inside = places(matrices, size, PER, PADDED)
    x = tl.load(logits + at, mask=inside, other=float("-inf")).to(WIDE)
    of_columns = subtracted + matrix * iterations * 2 * size + column
    of_rows = subtracted + (matrix * iterations * 2 + 1) * size + row
    along_columns, along_rows = (matrix < matrices) & (column < size), (matrix < matrices) & (row < size)
    for i in range(iterations):
        taken = subtrahend(x, 1)
        tl.store(of_columns + i * 2 * size, taken, mask=along_columns)
        x -= taken
        taken = subtrahend(x, 2)
        tl.store(of_rows + i * 2 * size, taken, mask=along_rows)
        x -= taken
    # What one thread wrote another may read.
    tl.debug_barrier()
    probability = tl.exp(x)
    g = tl.load(grad + at, mask=inside, other=0.0).to(WIDE) * probability
    for i in range(iterations):
        step = (iterations - 1 - i) * 2 * size
        g -= tl.exp(x) * tl.sum(g, axis=2, keep_dims=True)
        x += tl.load(of_rows + step, mask=along_rows, other=0.0)
        g -= tl.exp(x) * tl.sum(g, axis=1, keep_dims=True)
        x += tl.load(of_columns + step, mask=along_columns, other=0.0)
    tl.store(dlogits + at, g, mask=inside)


def same_shape(logits_MNN: Tensor, *others: Any) -> Tensor:
    return torch.empty_like(logits_MNN, memory_format=torch.contiguous_format)


@shaped_by(same_shape)
def forward(logits_MNN: Tensor, iterations: int) -> Tensor:
    out_MNN = same_shape(logits_MNN)
    launch(sinkhorn_kernel, iterations, logits_MNN.contiguous(), out_MNN)
    return out_MNN


@shaped_by(same_shape)
def backward(logits_MNN: Tensor, iterations: int, grad_MNN: Tensor) -> Tensor:
    dlogits_MNN = same_shape(logits_MNN)
    subtracted_MSN = logits_MNN.new_empty(len(logits_MNN), 2 * iterations, logits_MNN.shape[-1])
    operands = (logits_MNN.contiguous(), grad_MNN.contiguous(), subtracted_MSN, dlogits_MNN)
    launch(sinkhorn_backward_kernel, iterations, *operands)
    return dlogits_MNN


def launch(kernel: Any, iterations: int, logits_MNN: Tensor, *others: Tensor) -> None:
    matrices, size, _ = logits_MNN.shape
    padded = triton.next_power_of_2(size)
    per = max(1, HELD // padded**2)
    if matrices:
        kernel[(triton.cdiv(matrices, per),)](
            logits_MNN,
            *others,
            matrices,
            size,
            iterations,
            PER=per,
            PADDED=padded,
            WIDE=wide(logits_MNN.dtype),
        )


class _Sinkhorn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_MNN: Tensor, iterations: int) -> Tensor:
        ctx.save_for_backward(logits_MNN)
        ctx.iterations = iterations
        return forward(logits_MNN, iterations)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return backward(ctx.saved_tensors[0], ctx.iterations, grads[0]), None


def sinkhorn(logits_NN: Tensor, iterations: int) -> Tensor:
    """See `models.kernels.sinkhorn.reference`."""
    made: Tensor = _Sinkhorn.apply(logits_NN.flatten(0, -3), iterations)  # type: ignore[assignment]
    return made.view(logits_NN.shape)
