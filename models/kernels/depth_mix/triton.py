"""Weighted sums over depth as Triton kernels: one read of the sources makes all ways, one more all gradients.

With J sources and C ways of N tokens the forward pass must move (J + C) N D elements, the backward pass (2 J + C) N D.
Shape suffixes: N tokens, D model width, C ways, J sources, K blocks of D.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.kernels.launch import addresses, aligned, block, wide
from models.kernels.opaque import shaped_by


@triton.jit
def element(table, index, like):
    """The tensor of this index in a table of addresses. like: tensors of its type."""
    # Without the hint nothing is known of the address, and loads would go by single elements.
    return tl.multiple_of(tl.load(table + index).to(like[0].dtype), 16)


@triton.jit
def mix_kernel(
    xs, w, outs, w_stride, width, sources, WAYS: tl.constexpr, PADDED: tl.constexpr,
    BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One token's block of channels of every way. xs: where the sources are. PADDED: WAYS, to a power of 2."""
    token = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    way = tl.arange(0, PADDED)
    at = token * width + channel
    inside = channel < width
    out = tl.zeros([PADDED, BLOCK], WIDE)
    for j in range(sources):
        x = tl.load(element(xs, j, outs) + at, mask=inside, other=0.0).to(WIDE)
        weight = tl.load(w + token * w_stride + way * sources + j, mask=way < WAYS, other=0.0).to(WIDE)
        out += weight[:, None] * x[None, :]
    for c in tl.static_range(WAYS):
        row = tl.sum(tl.where(way[:, None] == c, out, 0.0), axis=0)
        tl.store(outs[c] + at, row.to(outs[c].dtype.element_ty), mask=inside)


@triton.jit
def mix_backward_kernel(
    xs, w, grads, dxs, dw, w_stride, width, sources, WAYS: tl.constexpr, PADDED: tl.constexpr,
    BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One token's block of channels of every source's gradient, and that block's share of the weights'."""
    token, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    channel = part * BLOCK + tl.arange(0, BLOCK)
    way = tl.arange(0, PADDED)
    at = token * width + channel
    inside = channel < width
    grad = tl.zeros([PADDED, BLOCK], WIDE)
    for c in tl.static_range(WAYS):
        row = tl.load(grads[c] + at, mask=inside, other=0.0).to(WIDE)
        grad = tl.where(way[:, None] == c, row[None, :], grad)
    share = dw + (token * tl.num_programs(1) + part) * WAYS * sources + way * sources
    for j in range(sources):
        x = tl.load(element(xs, j, grads) + at, mask=inside, other=0.0).to(WIDE)
        tl.store(share + j, tl.sum(grad * x[None, :], axis=1), mask=way < WAYS)
        weight = tl.load(w + token * w_stride + way * sources + j, mask=way < WAYS, other=0.0).to(WIDE)
        dx = tl.sum(weight[:, None] * grad, axis=0)
        tl.store(element(dxs, j, grads) + at, dx.to(grads[0].dtype.element_ty), mask=inside)


def shapes(w_NCJ: Tensor, sources: list[Tensor]) -> list[Tensor]:
    return [torch.empty_like(sources[0], memory_format=torch.contiguous_format) for _ in range(w_NCJ.shape[-2])]


@shaped_by(shapes)
def mix(w_NCJ: Tensor, sources: list[Tensor]) -> list[Tensor]:
    """sources: J of [N, D]. w: [N, C, J], or [C, J] for all tokens. Returns C of [N, D]."""
    outs = shapes(w_NCJ, sources)
    sources, w_NCJ = [aligned(source) for source in sources], w_NCJ.contiguous()
    launch(mix_kernel, w_NCJ, sources, addresses(sources), w_NCJ, tuple(outs))
    return outs


def backward_shapes(w_NCJ: Tensor, sources: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    tokens, width = sources[0].shape
    blocks = triton.cdiv(width, block_of(w_NCJ, width))
    dtype = torch.promote_types(torch.promote_types(w_NCJ.dtype, sources[0].dtype), torch.float32)
    dxs = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in sources]
    return [w_NCJ.new_empty((tokens, blocks, *w_NCJ.shape[-2:]), dtype=dtype), *dxs]


@shaped_by(backward_shapes)
def mix_backward(w_NCJ: Tensor, sources: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    """Returns the gradient of w by blocks, [N, K, C, J], and those of the sources."""
    made = backward_shapes(w_NCJ, sources, grads)
    dw_NKCJ, *dxs = made
    sources, grads, w_NCJ = [aligned(x) for x in sources], [aligned(x) for x in grads], w_NCJ.contiguous()
    tables = addresses([*sources, *dxs]).chunk(2)
    launch(mix_backward_kernel, w_NCJ, sources, tables[0], w_NCJ, tuple(grads), tables[1], dw_NKCJ)
    return made


def block_of(w_NCJ: Tensor, width: int) -> int:
    """A way's share of what a program holds."""
    return block(width, 4096 // triton.next_power_of_2(w_NCJ.shape[-2]))


def launch(kernel: Any, w_NCJ: Tensor, sources: list[Tensor], *operands: Any) -> None:
    (tokens, width), (ways, count) = sources[0].shape, w_NCJ.shape[-2:]
    size = block_of(w_NCJ, width)
    if not tokens:
        return
    kernel[(tokens, triton.cdiv(width, size))](
        *operands,
        ways * count if w_NCJ.dim() == 3 else 0,
        width,
        count,
        WAYS=ways,
        PADDED=triton.next_power_of_2(ways),
        BLOCK=size,
        WIDE=wide(w_NCJ.dtype, sources[0].dtype),
    )


class _DepthMix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w_NCJ: Tensor, *sources: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(w_NCJ, *sources)
        return tuple(mix(w_NCJ, list(sources)))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        w_NCJ, *sources = ctx.saved_tensors
        dw_NKCJ, *dxs = mix_backward(w_NCJ, sources, list(grads))
        dw_NCJ = dw_NKCJ.sum(1) if w_NCJ.dim() == 3 else dw_NKCJ.sum((0, 1))
        return dw_NCJ.to(w_NCJ.dtype), *dxs


def depth_mix(sources: list[Tensor], w_CJ: Tensor) -> list[Tensor]:
    """See `models.kernels.depth_mix.reference`."""
    shape = sources[0].shape
    w_NCJ = w_CJ if w_CJ.dim() == 2 else w_CJ.flatten(0, -3)
    return [out.view(shape) for out in _DepthMix.apply(w_NCJ, *(x.reshape(-1, shape[-1]) for x in sources))]
