"""Text to train a tokenizer on: all of the training documents, or a part of them that depends on their hashes alone."""

from collections.abc import Callable, Iterator, Sequence

from trainer.data.document import PIECE
from trainer.data.sources import Unit
from trainer.data.split import Scanned, Split, documents

# Of more text than this many samples, only every n-th unit is read.
AROUND = 8


def chosen_units(scanned: Sequence[Scanned], limit: int) -> range:
    """The units that are read: all, or evenly spread ones that hold several times what is wanted."""
    total = sum(unit.bytes for unit in scanned)
    return range(0, len(scanned), max(1, total // (AROUND * limit)))


def sample(
    units: Sequence[Unit],
    scanned: Sequence[Scanned],
    text_key: str,
    split: Split,
    limit: int,
    advance: Callable[[int], None],
) -> Iterator[str]:
    """Pieces of about `limit` bytes of training documents, never more than a tenth above it."""
    chosen = chosen_units(scanned, limit)
    available = sum(scanned[index].bytes for index in chosen)
    below = min(1.0, limit / max(1, available)) * (1 << 64)
    taken = 0
    for index in chosen:
        for document in documents(units[index], text_key):
            # The split looks at the hash's first bytes, the sample at its last.
            if document is None or split.side(document) != "train":
                continue
            if int.from_bytes(document.digest[-8:], "big") >= below:
                continue
            for piece in document.pieces(PIECE):
                yield piece
                taken += len(piece.encode())
                if taken > limit * 1.1:
                    return
        advance(scanned[index].bytes)
