"""Token sequences from a stream of documents.

The documents, each ended by an end-of-document token, are one stream. Sequence i has tokens [i*S, i*S + T) of it as
targets and the token before each as input, so that a document's first token is predicted from the end of the document
before it, which is why that end belongs to the document it opens. With a stride S of T, every token is a target once.
With a smaller one the sequences overlap, and all but the first have their last S tokens as targets: every token is
still predicted once, from at least T - S tokens before it, or from all of its document.
"""

import numpy as np
import torch
from torch import Tensor

from trainer.data.rows import StreamRows, padding
from trainer.data.stream import Stream


class Sequences(StreamRows):
    """The sequences of a stream, or of a .bin/.idx pair by its prefix, by index. stride: default length.

    Raises ValueError when the files are missing, damaged, or hold no token.
    """

    def __init__(self, data: Stream | str, length: int, stride: int | None = None) -> None:
        super().__init__(Stream.open(data) if isinstance(data, str) else data, length)
        self.stride = stride or length

    def __len__(self) -> int:
        """How many sequences there are; the last may be filled up with padding."""
        return 1 + max(0, -(-(self.tokens - self.length) // self.stride))

    @property
    def full(self) -> int:
        """How many of them have no padding."""
        return max(0, 1 + (self.tokens - self.length) // self.stride)

    def predicted(self, count: int) -> int:
        """How many tokens the first `count` sequences predict; those are the stream's first."""
        return min(self.tokens, self.length + (count - 1) * self.stride) if count else 0

    def row(self, index: int) -> tuple[Tensor, ...]:
        tokens, targets, documents, positions = padding(self.length)
        start = index * self.stride
        stop = min(start + self.length, self.tokens)
        if index < len(self):
            known, starts = self.stream.part(start, stop), self.stream.starts
            count, before = len(known), self.length - self.stride if index else 0
            targets[before:count] = known[before:]
            # Before the first token stands the last one, which also ends a document.
            tokens[0] = self.stream.tokens[start - 1]
            tokens[1:count] = known[:-1]
            at = np.arange(start, stop)
            document = np.searchsorted(starts, at, side="right") - 1
            documents[:count] = document - document[0]
            positions[:count] = at - np.maximum(starts[document], start)
        return tuple(map(torch.from_numpy, (tokens, targets, documents, positions)))
