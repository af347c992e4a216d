"""Places in queues by Triton kernels that count: every block of items on its own, then the blocks before it.

Nothing is sorted, and no sum depends on who comes first. Must move 16 bytes an item: its queue in, its place out.
Shape suffixes: R rows, M items of a row, B blocks of a row, Q queues of a row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from models.kernels.opaque import shaped_by

ITEMS = 128  # of a block: each is compared with all
HELD = 64  # queues that a program counts at once


@triton.jit
def count_kernel(queue, counts, items, queues, blocks, BLOCK: tl.constexpr, HELD: tl.constexpr):
    """counts: of each block, [R, B, Q]."""
    program = tl.program_id(0).to(tl.int64)
    row, block = program // blocks, program % blocks
    item = block * BLOCK + tl.arange(0, BLOCK)
    own = tl.load(queue + row * items + item, mask=item < items, other=-1)
    first = program * queues
    for start in range(0, queues, HELD):
        number = start + tl.arange(0, HELD)
        there = tl.sum((own[:, None] == number[None, :]).to(tl.int32), axis=0)
        tl.store(counts + first + number, there, mask=number < queues)


@triton.jit
def place_kernel(queue, before, place, items, queues, blocks, BLOCK: tl.constexpr):
    """before: of each queue in earlier blocks, [R, B, Q]."""
    program = tl.program_id(0).to(tl.int64)
    row, block = program // blocks, program % blocks
    index = tl.arange(0, BLOCK)
    item = block * BLOCK + index
    own = tl.load(queue + row * items + item, mask=item < items, other=-1)
    first = program * queues
    ahead = (own[:, None] == own[None, :]) & (index[None, :] < index[:, None])
    there = tl.load(before + first + own, mask=own >= 0, other=0)
    rank = tl.sum(ahead.to(tl.int32), axis=1) + there
    tl.store(place + row * items + item, tl.where(own < 0, -1, rank), mask=item < items)


def shapes(queue_RM: Tensor, num_queues: int) -> list[Tensor]:
    return [queue_RM.new_empty(queue_RM.shape), queue_RM.new_empty(len(queue_RM), num_queues)]


@shaped_by(shapes)
def placed(queue_RM: Tensor, num_queues: int) -> list[Tensor]:
    queue_RM = queue_RM.contiguous()
    rows, items = queue_RM.shape
    if not queue_RM.numel():
        return [torch.empty_like(queue_RM), queue_RM.new_zeros(rows, num_queues)]
    place_RM, blocks = torch.empty_like(queue_RM), triton.cdiv(items, ITEMS)
    counts_RBQ = queue_RM.new_empty(rows, blocks, num_queues, dtype=torch.int32)
    # Along the first axis, since a GPU's others end at 65,535.
    count_kernel[(rows * blocks,)](queue_RM, counts_RBQ, items, num_queues, blocks, BLOCK=ITEMS, HELD=HELD)
    until_RBQ = counts_RBQ.cumsum(1)
    before_RBQ = (until_RBQ - counts_RBQ).to(torch.int32)
    place_kernel[(rows * blocks,)](queue_RM, before_RBQ, place_RM, items, num_queues, blocks, BLOCK=ITEMS)
    return [place_RM, until_RBQ[:, -1].contiguous()]


def queues(queue_RM: Tensor, num_queues: int) -> tuple[Tensor, Tensor]:
    """See `models.kernels.queues.reference`. Takes the time and memory of M / 128 counts for every queue."""
    place_RM, counts_RQ = placed(queue_RM, num_queues)
    return place_RM, counts_RQ
