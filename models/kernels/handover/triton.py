"""A write of streams and the read behind it as one Triton kernel. Tokens of a program are written, and their logits
summed up, a block of channels after another; then what is read of them comes back out of the cache.

The forward pass must move (2 R + P + Q) N D elements. The backward pass is that of its parts, which are given what the
kernel made; it takes the read's weights as `settle` rounds them, where the kernel has them in float32.
Shape suffixes: N tokens, R rows (streams, or their fractions), Q rows read, P rows of what a branch made, J = R + P,
D width, K logits of a row or, flat, of all rows.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from models.kernels.handover.reading import Reading, Settle
from models.kernels.normed_product.triton import depth, normed, padded, shift, weighted
from models.kernels.opaque import shaped_by
from models.kernels.stream_mix.triton import mixed, operands
from models.kernels.wide import wide
from models.state import State

LINES = 64  # rows of a program, if there are no more of a token
BLOCK = 64  # channels
TOKENS = 16  # of a program whose logits are flat; what a product of tiles takes


@triton.jit
def mixed_lines(streams, out, w, w_stride, token, q, d, line, here, rows, made, width, LINES: tl.constexpr,
                BLOCK: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """Row q of its token for each line, [LINES, BLOCK]. made: P."""
    x = tl.zeros([LINES, BLOCK], WIDE)
    weight = w + token * w_stride + q * (rows + made)
    for j in range(rows):
        part = tl.load(streams + (token * rows + j)[:, None] * width + d[None, :], mask=here, other=0.0)
        x += tl.load(weight + j, mask=line, other=0.0).to(WIDE)[:, None] * part.to(WIDE)
    for p in range(made):
        part = tl.load(out + (token * made + p)[:, None] * width + d[None, :], mask=here, other=0.0)
        x += tl.load(weight + rows + p, mask=line, other=0.0).to(WIDE)[:, None] * part.to(WIDE)
    return x


@triton.jit
def squashed(still, by, z, SQUASH: tl.constexpr):
    """Weights, from the static parts, their scale and the logits."""
    if SQUASH == "sigmoid":
        weights = 1.0 / (1.0 + tl.exp(-(still + by * z)))
    elif SQUASH == "tanh":
        weights = still + by * (2.0 / (1.0 + tl.exp(-2.0 * z)) - 1.0)
    else:
        weights = still + by * z
    return weights


@triton.jit
def normed_scale(total, square, size, eps, CENTRED: tl.constexpr):
    """Mean and factor of a norm over so many elements."""
    mean = total / size if CENTRED else tl.zeros_like(total)
    # The difference of two sums may round to less than nothing.
    return mean, 1.0 / tl.sqrt(tl.maximum(square / size - mean * mean, 0.0) + eps)


@triton.jit
def rows_kernel(
    streams, out, w, w_stride, columns, sums, shift, static, scale, written, logits, means, scales, read, tokens,
    width, rows, made, count, ways, stride, eps, RPADDED: tl.constexpr, CPADDED: tl.constexpr, BLOCK: tl.constexpr,
    CENTRED: tl.constexpr, SQUASH: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, LINES: tl.constexpr,
):  # fmt: skip
    """Logits of each row. A line is a row of a token. made: P. count: K. ways: Q. sums: of the columns. static: of each
    row and logit."""
    line, column = tl.arange(0, LINES), tl.arange(0, CPADDED)
    q = line % RPADDED
    token = tl.program_id(0).to(tl.int64) * (LINES // RPADDED) + line // RPADDED
    there = (token < tokens) & (q < rows)
    place = token * rows + q
    product = tl.zeros([LINES, CPADDED], WIDE)
    total, square = tl.zeros([LINES], WIDE), tl.zeros([LINES], WIDE)
    for start in range(0, width, BLOCK):
        d = start + tl.arange(0, BLOCK)
        here = there[:, None] & (d < width)[None, :]
        x = mixed_lines(streams, out, w, w_stride, token, q, d, there, here, rows, made, width, LINES, BLOCK, WIDE)
        stored = x.to(written.dtype.element_ty)
        tl.store(written + place[:, None] * width + d[None, :], stored, mask=here)
        x = stored.to(WIDE)
        total += tl.sum(x, axis=1)
        square += tl.sum(x * x, axis=1)
        inside = (d < width)[:, None] & (column < count)[None, :]
        tile = tl.load(columns + d[:, None] * count + column[None, :], mask=inside, other=0.0).to(WIDE)
        product += tl.dot(x, tile, input_precision=PRECISION, out_dtype=WIDE)
    mean, factor = normed_scale(total, square, width, eps, CENTRED)
    tl.store(means + place, mean, mask=there)
    tl.store(scales + place, factor, mask=there)
    inside = there[:, None] & (column < count)[None, :]
    each = tl.load(sums + column, mask=column < count, other=0.0).to(WIDE)
    product = (product - mean[:, None] * each[None, :]) * factor[:, None]
    tl.store(logits + place[:, None] * count + column[None, :], product, mask=inside)
    z = product + tl.load(shift + column, mask=column < count, other=0.0).to(WIDE)[None, :]
    still = tl.load(static + q[:, None] * count + column[None, :], mask=inside, other=0.0).to(WIDE)
    weights = squashed(still, tl.load(scale).to(WIDE), z, SQUASH)
    # Threads read here what others of this program wrote.
    tl.debug_barrier()
    owner = tl.program_id(0).to(tl.int64) * (LINES // RPADDED) + tl.arange(0, LINES // RPADDED)
    for start in range(0, width, BLOCK):
        d = start + tl.arange(0, BLOCK)
        here = there[:, None] & (d < width)[None, :]
        x = tl.load(written + place[:, None] * width + d[None, :], mask=here, other=0.0).to(WIDE)
        for c in range(ways):
            weight = tl.sum(tl.where((column == c * stride)[None, :], weights, 0.0), axis=1)
            found = tl.sum(tl.reshape(x * weight[:, None], [LINES // RPADDED, RPADDED, BLOCK]), axis=1)
            to = read + (owner * ways + c)[:, None] * width + d[None, :]
            tl.store(to, found.to(read.dtype.element_ty), mask=(owner < tokens)[:, None] & (d < width)[None, :])


@triton.jit
def flat_kernel(
    streams, out, w, w_stride, columns, sums, shift, static, scale, written, logits, means, scales, read, tokens,
    width, rows, made, count, ways, stride, eps, CPADDED: tl.constexpr, BLOCK: tl.constexpr, CENTRED: tl.constexpr,
    SQUASH: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, LINES: tl.constexpr,
):  # fmt: skip
    """Logits of all rows of a token, which is a line. ways: 1. static: of each logit. Else see `rows_kernel`."""
    token = tl.program_id(0).to(tl.int64) * LINES + tl.arange(0, LINES)
    there, column = token < tokens, tl.arange(0, CPADDED)
    product = tl.zeros([LINES, CPADDED], WIDE)
    total, square = tl.zeros([LINES], WIDE), tl.zeros([LINES], WIDE)
    for start in range(0, width, BLOCK):
        d = start + tl.arange(0, BLOCK)
        here = there[:, None] & (d < width)[None, :]
        inside = (d < width)[:, None] & (column < count)[None, :]
        for q in range(rows):
            x = mixed_lines(streams, out, w, w_stride, token, q, d, there, here, rows, made, width, LINES, BLOCK, WIDE)
            stored = x.to(written.dtype.element_ty)
            tl.store(written + (token * rows + q)[:, None] * width + d[None, :], stored, mask=here)
            x = stored.to(WIDE)
            total += tl.sum(x, axis=1)
            square += tl.sum(x * x, axis=1)
            of_row = columns + (q * width + d)[:, None] * count + column[None, :]
            tile = tl.load(of_row, mask=inside, other=0.0).to(WIDE)
            product += tl.dot(x, tile, input_precision=PRECISION, out_dtype=WIDE)
    mean, factor = normed_scale(total, square, width * rows, eps, CENTRED)
    tl.store(means + token, mean, mask=there)
    tl.store(scales + token, factor, mask=there)
    each = tl.load(sums + column, mask=column < count, other=0.0).to(WIDE)
    product = (product - mean[:, None] * each[None, :]) * factor[:, None]
    place = token[:, None] * count + column[None, :]
    tl.store(logits + place, product, mask=there[:, None] & (column < count)[None, :])
    z = product + tl.load(shift + column, mask=column < count, other=0.0).to(WIDE)[None, :]
    still = tl.load(static + column, mask=column < count, other=0.0).to(WIDE)[None, :]
    weights = squashed(still, tl.load(scale).to(WIDE), z, SQUASH)
    # Threads read here what others of this program wrote.
    tl.debug_barrier()
    for start in range(0, width, BLOCK):
        d = start + tl.arange(0, BLOCK)
        here = there[:, None] & (d < width)[None, :]
        found = tl.zeros([LINES, BLOCK], WIDE)
        for r in range(rows):
            weight = tl.sum(tl.where((column == r * stride)[None, :], weights, 0.0), axis=1)
            part = tl.load(written + (token * rows + r)[:, None] * width + d[None, :], mask=here, other=0.0)
            found += weight[:, None] * part.to(WIDE)
        tl.store(read + token[:, None] * width + d[None, :], found.to(read.dtype.element_ty), mask=here)


def shapes(groups: list[Tensor], w: Tensor, table: list[Tensor], numbers: list[int], *rest: object) -> list[Tensor]:
    (streams_NRD, _), columns_DK, ways, flat = groups, table[0], numbers[0], bool(numbers[2])
    tokens, rows, width = streams_NRD.shape
    lines = tokens if flat else tokens * rows
    return [
        torch.empty_like(streams_NRD, memory_format=torch.contiguous_format),
        columns_DK.new_empty(lines, columns_DK.shape[1]),
        columns_DK.new_empty(lines),
        columns_DK.new_empty(lines),
        streams_NRD.new_empty(tokens, ways, width),
    ]


@shaped_by(shapes)
def forward(
    groups: list[Tensor], w: Tensor, table: list[Tensor], numbers: list[int], eps: float, squash: str
) -> list[Tensor]:
    """groups: streams [N, R, D] and out [N, P, D]. w: [N, R, J] or [R, J]. table: columns [D, K] or flat [R D, K], the
    shift [K], the static parts, by logit, and their scale [1]. numbers: Q, the stride, whether flat, whether centred.
    Returns the streams, what `normed_product.triton.product` makes of them, and what is read."""
    made = shapes(groups, w, table, numbers)
    groups = [group.contiguous() for group in groups]
    (streams_NRD, out_NPD), (columns_DK, *others), (ways, stride, flat, centred) = groups, table, numbers
    (tokens, rows, width), count = streams_NRD.shape, columns_DK.shape[1]
    if not tokens:
        return made
    flags: dict[str, Any] = {"LINES": TOKENS}
    kernel = flat_kernel
    if not flat:
        kernel, of_token = rows_kernel, triton.next_power_of_2(rows)
        flags = {"RPADDED": of_token, "LINES": max(LINES, of_token)}
    kernel[(triton.cdiv(tokens, flags["LINES"] // flags.get("RPADDED", 1)),)](
        *(streams_NRD, out_NPD, w.contiguous(), w.shape[-2] * w.shape[-1] if w.dim() == 3 else 0),
        *(columns_DK.contiguous(), columns_DK.sum(0), *others, *made),
        *(tokens, width, rows, out_NPD.shape[1], count, ways, stride, eps),
        CPADDED=padded(count),
        BLOCK=min(depth(count), BLOCK),
        CENTRED=bool(centred),
        SQUASH=squash,
        WIDE=wide(columns_DK.dtype, streams_NRD.dtype),
        # A product of bfloat16 has fewer digits than TF32 keeps.
        PRECISION="tf32" if streams_NRD.dtype == torch.bfloat16 else "ieee",
        **flags,
    )
    return made


def by_logit(reading: Reading, rows: int, like: Tensor) -> Tensor:
    """The static parts where their logits are among those of a token; 0 elsewhere."""
    count, static_RQ, stride = reading.columns_DK.shape[1], reading.static_RQ.to(like.dtype), reading.stride
    table = like.new_zeros(1 if reading.flat else rows, count)
    placed = static_RQ.mT if reading.flat else static_RQ
    table[:, : stride * placed.shape[1] : stride] = placed
    return table.flatten()


def handover(
    streams_RD: Tensor,
    m_RR: Tensor,
    out_PD: Tensor,
    b_PR: Tensor,
    moves: bool,
    reading: Reading | None,
    settle: Settle,
    mix: Callable[..., Tensor],
) -> tuple[Tensor, Tensor, State]:
    """See `models.kernels.handover.reference`. `mix` and the product are those of Triton: see `Op.within`."""
    tokens, rows = streams_RD.shape[:-2], streams_RD.shape[-2]
    w, groups = operands(streams_RD, m_RR, out_PD, b_PR, moves)
    if reading is None:
        weights_RQ, kept = settle(None)
        # A mix of what is written is one of what it is made of.
        w = torch.cat([w, weights_RQ.mT.to(w.dtype) @ w], dim=-2)
        written, read = mixed(w, groups, [rows, weights_RQ.shape[-1]])
        return written.unflatten(0, tokens), read.unflatten(0, tokens), kept
    columns_DK = weighted(reading.columns_DK, reading.weight_D, streams_RD)
    shift_K = shift(reading.columns_DK, reading.bias_D, columns_DK)
    with torch.no_grad():
        by = reading.scale_1.to(columns_DK.dtype)
        moved = torch.zeros_like(columns_DK[0]) if shift_K is None else shift_K
        table = [columns_DK, moved, by_logit(reading, rows, columns_DK), by]
        numbers = [reading.static_RQ.shape[1], reading.stride, int(reading.flat), int(shift_K is not None)]
        written, *made, read = forward(groups, w, table, numbers, reading.eps, reading.squash)
    (written,) = mixed(w, groups, known=[written])
    seen = written.flatten(-2) if reading.flat else written
    logits = normed(seen, columns_DK, shift_K, reading.eps, made)
    weights_RQ, kept = settle(logits.unflatten(0, tokens))
    (read,) = mixed(*operands(written, weights_RQ.flatten(0, -3), None, None, False), known=[read])
    return written.unflatten(0, tokens), read.unflatten(0, tokens), kept
