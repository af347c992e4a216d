"""Sequences of one length, by index: what training takes its samples from, and evaluation its batches.

Shape suffixes: N sequences, T tokens of a sequence.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from models.loss import IGNORE
from parallel.engine import Batch
from trainer.data.stream import Stream


class Rows:
    """Base of what has sequences of `length` tokens by index. A kind defines `__len__` and `row`."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        """How many sequences there are."""
        raise NotImplementedError

    @property
    def full(self) -> int:
        """How many of them, from the first, an epoch of training takes."""
        return len(self)

    def row(self, index: int) -> tuple[Tensor, ...]:
        """Tokens, targets, document ids and positions, each [T]; both count from the row's beginning.

        An index past the end gives a row of padding. Raises ValueError for a token outside the vocabulary.
        """
        raise NotImplementedError

    def rows(self, indices: Sequence[int]) -> Batch:
        """Sequences by index, as a batch [N, T]; an index past the end gives a sequence of padding."""
        return stacked(map(self.row, indices))

    def __str__(self) -> str:
        """For the line on how often a run goes through them."""
        return f"{self.full:,} sequences"


class StreamRows(Rows):
    """Base of what makes them out of a stream."""

    def __init__(self, stream: Stream, length: int) -> None:
        super().__init__(length)
        self.stream, self.tokens = stream, len(stream)


def share(start: int, count: int, data_rank: int, data_size: int, micro_batch: int) -> list[int]:
    """The samples, of start..start+count-1, that one data rank takes, micro-batch-major.

    Micro-batch m is the contiguous run of data_size * micro_batch samples from start + m * data_size * micro_batch, of
    which each rank takes its part in order. Raises ValueError when count does not divide.
    """
    across = data_size * micro_batch
    if count % across:
        near = max(across, count // across * across)
        raise ValueError(
            f"global_batch is {count}, which {data_size} data ranks x micro_batch {micro_batch} = {across} must "
            f"divide; use global_batch={near}, or another micro_batch"
        )
    first = start + data_rank * micro_batch
    return [first + m * across + i for m in range(count // across) for i in range(micro_batch)]


def padding(length: int) -> tuple[np.ndarray, ...]:
    """The tokens, targets, document ids and positions of a row without any token, each [T], to be filled."""
    tokens, positions = np.zeros(length, dtype=np.int64), np.zeros(length, dtype=np.int64)
    return tokens, np.full(length, IGNORE, dtype=np.int64), np.full(length, -1, dtype=np.int64), positions


def stacked(rows: Iterable[tuple[Tensor, ...]]) -> Batch:
    """Rows, each as `Rows.row` gives it, as a batch [N, T]."""
    return Batch(*(torch.stack(parts) for parts in zip(*rows, strict=True)))


def on_device(batch: Batch, device: str) -> Batch:
    return Batch(**{name: x.to(device, non_blocking=True) for name, x in batch.side().items()})
