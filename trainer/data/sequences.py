"""Token sequences from an indexed dataset.

The documents, each ended by an end-of-document token, are one stream. Sequence i has tokens [i*T, (i+1)*T) of it as
targets and the token before each as input, so that every token is predicted exactly once, and a document's first token
from the end of the document before it, which is why that end belongs to the document it opens.
Shape suffixes: N sequences, T tokens of a sequence.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from models.loss import IGNORE
from parallel.engine import Batch
from trainer.data.check import open_data, refuse_outside, vocabulary


class Sequences:
    """The sequences of one .bin/.idx pair, by index.

    Raises ValueError when the files are missing, damaged, or hold no token.
    """

    def __init__(self, prefix: str, length: int) -> None:
        index, self._stream = open_data(prefix)
        self.prefix, self.length, self.tokens = prefix, length, index.tokens
        self._vocab_size = vocabulary(prefix)
        ends = np.concatenate([[0], index.lengths.astype(np.int64).cumsum()])
        # A document may be stored in several pieces, and may be empty.
        self._starts = np.unique(ends[index.documents])
        self._starts = self._starts[self._starts < self.tokens]

    def __len__(self) -> int:
        """How many sequences there are; the last may be filled up with padding."""
        return -(-self.tokens // self.length)

    @property
    def full(self) -> int:
        """How many of them have no padding."""
        return self.tokens // self.length

    def rows(self, indices: Sequence[int]) -> Batch:
        """Sequences by index, as a batch [N, T]; an index past the end gives a sequence of padding."""
        return Batch(*(torch.stack(parts) for parts in zip(*map(self._row, indices), strict=True)))

    def _row(self, index: int) -> tuple[Tensor, ...]:
        """Tokens, targets, document ids and positions, each [T]; both count from the row's beginning."""
        tokens = np.zeros(self.length, dtype=np.int64)
        targets = np.full(self.length, IGNORE, dtype=np.int64)
        documents = np.full(self.length, -1, dtype=np.int64)
        positions = np.zeros(self.length, dtype=np.int64)
        start = index * self.length
        stop = min(start + self.length, self.tokens)
        count = max(0, stop - start)
        if count:
            targets[:count] = self._stream[start:stop]
            if self._vocab_size is not None:
                refuse_outside(self.prefix, targets[:count], start, self._vocab_size)
            # Before the first token stands the last one, which also ends a document.
            tokens[0] = self._stream[start - 1]
            tokens[1:count] = targets[: count - 1]
            at = np.arange(start, stop)
            document = np.searchsorted(self._starts, at, side="right") - 1
            documents[:count] = document - document[0]
            positions[:count] = at - np.maximum(self._starts[document], start)
        return tuple(map(torch.from_numpy, (tokens, targets, documents, positions)))


def on_device(batch: Batch, device: str) -> Batch:
    return Batch(**{name: x.to(device, non_blocking=True) for name, x in batch.side().items()})
