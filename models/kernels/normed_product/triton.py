"""A norm and the product behind it as Triton kernels. What the norm divides by is known only at a row's end: so the
product is of the row as it is, and is divided afterwards.

The forward pass must move M D elements, the backward pass 3 M D, M D of them in the product that torch makes.
Shape suffixes: M rows, D width, K columns.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.kernels.opaque import shaped_by
from models.kernels.wide import wide

ROWS, NARROWEST = 16, 16  # of a program; what a product of tiles takes
DEEPEST, HELD = 128, 16384  # of a product of tiles, and the elements of a tile of w


@triton.jit
def product_kernel(
    x, w, sums, out, means, scales, rows, width, columns, eps, PADDED: tl.constexpr, ROWS: tl.constexpr,
    DEPTH: tl.constexpr, CENTRED: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """sums: of each column of w."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, PADDED)
    product = tl.zeros([ROWS, PADDED], WIDE)
    total, square = tl.zeros([ROWS], WIDE), tl.zeros([ROWS], WIDE)
    for start in range(0, width, DEPTH):
        d = start + tl.arange(0, DEPTH)
        here = (row < rows)[:, None] & (d < width)[None, :]
        tile = tl.load(x + row[:, None] * width + d[None, :], mask=here, other=0.0).to(WIDE)
        there = (d < width)[:, None] & (column < columns)[None, :]
        weight = tl.load(w + d[:, None] * columns + column[None, :], mask=there, other=0.0).to(WIDE)
        product += tl.dot(tile, weight, input_precision=PRECISION, out_dtype=WIDE)
        total += tl.sum(tile, axis=1)
        square += tl.sum(tile * tile, axis=1)
    mean = total / width if CENTRED else tl.zeros([ROWS], WIDE)
    # The difference of two sums may round to less than nothing.
    scale = 1.0 / tl.sqrt(tl.maximum(square / width - mean * mean, 0.0) + eps)
    each = tl.load(sums + column, mask=column < columns, other=0.0).to(WIDE)
    product = (product - mean[:, None] * each[None, :]) * scale[:, None]
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    tl.store(out + row[:, None] * columns + column[None, :], product, mask=inside)
    tl.store(means + row, mean, mask=row < rows)
    tl.store(scales + row, scale, mask=row < rows)


@triton.jit
def product_backward_kernel(
    x, w, sums, out, means, scales, grad, dx, rows, width, columns, PADDED: tl.constexpr, ROWS: tl.constexpr,
    DEPTH: tl.constexpr, CENTRED: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, PADDED)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    at = row[:, None] * columns + column[None, :]
    g = tl.load(grad + at, mask=inside, other=0.0).to(WIDE)
    made = tl.load(out + at, mask=inside, other=0.0).to(WIDE)
    each = tl.load(sums + column, mask=column < columns, other=0.0).to(WIDE)
    mean, scale = tl.load(means + row, mask=row < rows, other=0.0), tl.load(scales + row, mask=row < rows, other=0.0)
    # Means over the row of g w^T, and of it times the normed row.
    along = tl.sum(g * made, axis=1) / width
    level = tl.sum(g * each[None, :], axis=1) / width if CENTRED else tl.zeros([ROWS], WIDE)
    for start in range(0, width, DEPTH):
        d = start + tl.arange(0, DEPTH)
        here = (row < rows)[:, None] & (d < width)[None, :]
        place = row[:, None] * width + d[None, :]
        normed = (tl.load(x + place, mask=here, other=0.0).to(WIDE) - mean[:, None]) * scale[:, None]
        there = (d < width)[None, :] & (column < columns)[:, None]
        weight = tl.load(w + d[None, :] * columns + column[:, None], mask=there, other=0.0).to(WIDE)
        back = tl.dot(g, weight, input_precision=PRECISION, out_dtype=WIDE)
        back = (back - level[:, None] - normed * along[:, None]) * scale[:, None]
        tl.store(dx + place, back.to(dx.dtype.element_ty), mask=here)


def shapes(x_MD: Tensor, w_DK: Tensor, eps: float, centred: bool) -> list[Tensor]:
    return [w_DK.new_empty(len(x_MD), w_DK.shape[1]), w_DK.new_empty(len(x_MD)), w_DK.new_empty(len(x_MD))]


@shaped_by(shapes)
def product(x_MD: Tensor, w_DK: Tensor, eps: float, centred: bool) -> list[Tensor]:
    """w: at least float32. Returns norm(x) w [M, K], and each row's mean and what it is multiplied by."""
    made = shapes(x_MD, w_DK, eps, centred)
    x_MD, w_DK = x_MD.contiguous(), w_DK.contiguous()
    launch(product_kernel, centred, x_MD, w_DK, w_DK.sum(0), *made, eps=eps)
    return made


def gradient_shape(x_MD: Tensor, *others: Any) -> Tensor:
    return torch.empty_like(x_MD, memory_format=torch.contiguous_format)


@shaped_by(gradient_shape)
def product_backward(x_MD: Tensor, w_DK: Tensor, made: list[Tensor], grad_MK: Tensor, centred: bool) -> Tensor:
    dx_MD = gradient_shape(x_MD)
    x_MD, w_DK = x_MD.contiguous(), w_DK.contiguous()
    launch(product_backward_kernel, centred, x_MD, w_DK, w_DK.sum(0), *made, grad_MK.contiguous(), dx_MD)
    return dx_MD


def launch(kernel: Any, centred: bool, x_MD: Tensor, w_DK: Tensor, *others: Tensor, **numbers: float) -> None:
    (rows, width), columns = x_MD.shape, w_DK.shape[1]
    if not rows:
        return
    # A product of bfloat16 has fewer digits than TF32 keeps.
    precision = "tf32" if x_MD.dtype == torch.bfloat16 else "ieee"
    kernel[(triton.cdiv(rows, ROWS),)](
        x_MD,
        w_DK,
        *others,
        rows,
        width,
        columns,
        *numbers.values(),
        PADDED=padded(columns),
        ROWS=ROWS,
        DEPTH=depth(columns),
        CENTRED=centred,
        WIDE=wide(w_DK.dtype),
        PRECISION=precision,
    )


def padded(columns: int) -> int:
    return max(NARROWEST, triton.next_power_of_2(columns))


def depth(columns: int) -> int:
    """Of tiles that fit into a GPU's shared memory."""
    return max(NARROWEST, min(DEEPEST, HELD // padded(columns)))


class _NormedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_MD: Tensor, w_DK: Tensor, eps: float, centred: bool, known: list[Tensor] | None) -> Tensor:
        made = product(x_MD, w_DK, eps, centred) if known is None else [x.detach() for x in known]
        ctx.save_for_backward(x_MD, w_DK, *made)
        ctx.centred = centred
        return made[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x_MD, w_DK, *made = ctx.saved_tensors
        _, means_M, scales_M = made
        dx_MD = product_backward(x_MD, w_DK, made, grads[0], ctx.centred)
        scaled_MK = grads[0] * scales_M[:, None]
        dw_DK = (x_MD.mT @ scaled_MK.to(x_MD.dtype)).to(w_DK.dtype) - means_M @ scaled_MK
        return dx_MD, dw_DK, None, None, None


def weighted(columns_DK: Tensor, weight_D: Tensor, like: Tensor) -> Tensor:
    """The columns with the norm's weight in them, at least float32, and as `like`."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    return weight_D.to(dtype)[:, None] * columns_DK.to(dtype)


def shift(columns_DK: Tensor, bias_D: Tensor | None, w_DK: Tensor) -> Tensor | None:
    """[K], what the norm's bias adds."""
    return None if bias_D is None else bias_D.to(w_DK.dtype) @ columns_DK.to(w_DK.dtype)


def normed(x_D: Tensor, w_DK: Tensor, shift_K: Tensor | None, eps: float, known: list[Tensor] | None = None) -> Tensor:
    """known: what `product` returns, where it has been computed already, to be differentiated."""
    x_MD, centred = x_D.flatten(0, -2), shift_K is not None
    out_MK: Tensor = _NormedProduct.apply(x_MD, w_DK, eps, centred, known)  # type: ignore[assignment]
    out_K = out_MK.view(*x_D.shape[:-1], w_DK.shape[1])
    return out_K if shift_K is None else out_K + shift_K


def normed_product(x_D: Tensor, columns_DK: Tensor, weight_D: Tensor, bias_D: Tensor | None, eps: float) -> Tensor:
    """See `models.kernels.normed_product.reference`."""
    w_DK = weighted(columns_DK, weight_D, x_D)
    return normed(x_D, w_DK, shift(columns_DK, bias_D, w_DK), eps)
