"""Documents that are not cut where that can be helped, and padding behind them.

Source: Ding et al., "Fewer Truncations Improve Language Modeling", arXiv 2404.10830.
Shape suffixes: D documents, P pieces, S sequences, T tokens of a sequence.
"""

import dataclasses

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.data.packing.base import PackingConfig
from trainer.data.packing.best_fit import best_fit_decreasing
from trainer.data.rows import StreamRows, padding
from trainer.data.stream import Stream


@dataclasses.dataclass(frozen=True)
class Whole(PackingConfig, kind="whole"):
    """Documents are cut only where they are longer than a sequence, and put together by best fit; the rest is padding.

    A longer one is cut into pieces of a sequence each, and what remains is packed as a document.
    """

    def pack(self, stream: Stream, length: int) -> StreamRows:
        return WholeDocuments(stream, length)


class WholeDocuments(StreamRows):
    """The sequences, in the order in which their first pieces stand in the stream, as do the pieces of each.

    The plan is 12 bytes for each piece and 8 for each sequence, and is made anew by every process: it takes less time
    than the files of a large dataset take to be read, and a file of it could be half-written, or of other data.
    """

    def __init__(self, stream: Stream, length: int) -> None:
        super().__init__(stream, length)
        starts_P, sizes_P = pieces(stream.starts, len(stream), length)
        bins_P = best_fit_decreasing(sizes_P, length)
        # A bin goes by its first piece, which puts bins into the order of the stream.
        first_S = np.full(int(bins_P.max()) + 1, bins_P.size)
        np.minimum.at(first_S, bins_P, np.arange(bins_P.size))
        key_P = first_S[bins_P]
        order_P = np.argsort(key_P, kind="stable")
        self._starts_P, self._sizes_P = starts_P[order_P], sizes_P[order_P].astype(np.int32)
        self._bounds = np.concatenate([[0], np.flatnonzero(np.diff(key_P[order_P])) + 1, [bins_P.size]])

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def row(self, index: int) -> tuple[Tensor, ...]:
        tokens_T, targets_T, documents_T, positions_T = padding(self.length)
        if index < len(self):
            here = slice(*self._bounds[index : index + 2])
            starts_P, sizes_P = self._starts_P[here], self._sizes_P[here]
            first_P = sizes_P.cumsum() - sizes_P
            inside = slice(sizes_P.sum())
            documents_T[inside] = np.repeat(np.arange(sizes_P.size), sizes_P)
            positions_T[inside] = np.arange(inside.stop) - np.repeat(first_P, sizes_P)
            targets_T[inside] = self.stream.at(np.repeat(starts_P, sizes_P) + positions_T[inside])
            tokens_T[1 : inside.stop] = targets_T[: inside.stop - 1]
            # A piece is predicted from the token before it; before the first token stands the last one.
            tokens_T[first_P] = self.stream.at((starts_P - 1) % self.tokens)
        return tuple(map(torch.from_numpy, (tokens_T, targets_T, documents_T, positions_T)))

    def __str__(self) -> str:
        share = 1 - self.tokens / (len(self) * self.length)
        sizes_D = np.diff(self.stream.starts, append=self.tokens)
        cut = int((sizes_D > self.length).sum())
        return f"{super().__str__()}, {share:.2%} padding, {cut:,} of {sizes_D.size:,} documents cut"


def pieces(starts_D: NDArray[np.int64], tokens: int, length: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The first place and the size of every piece, in the order of the stream."""
    sizes_D = np.diff(starts_D, append=tokens)
    counts_D = -(-sizes_D // length)
    within_P = (np.arange(counts_D.sum()) - np.repeat(counts_D.cumsum() - counts_D, counts_D)) * length
    sizes_P = np.minimum(np.repeat(sizes_D, counts_D) - within_P, length)
    return np.repeat(starts_D, counts_D) + within_P, sizes_P
