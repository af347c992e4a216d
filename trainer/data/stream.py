"""Documents one behind another, as the tokens that they are read from: prepared before, or encoded from text here."""

import dataclasses
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from trainer.data.check import open_data, refuse_outside, vocabulary
from trainer.data.format import suffixes
from trainer.data.manifest import split_of
from trainer.data.shards import Writer
from trainer.data.sources import find_files, units
from trainer.data.split import documents
from trainer.data.tokenizer import Tokenizer
from trainer.progress import counting_bytes, say


@dataclasses.dataclass(frozen=True)
class Stream:
    """tokens: of all documents, each ended by an end-of-document token. starts: the place of each document's first.

    name: for messages. vocab_size: of the tokenizer, if known. bytes: of the text that the tokens are, if known.
    """

    name: str
    tokens: NDArray[Any]
    starts: NDArray[np.int64]
    vocab_size: int | None = None
    bytes: int | None = None

    @classmethod
    def open(cls, prefix: str) -> "Stream":
        """Of a .bin/.idx pair. Raises ValueError when the files are missing, damaged, or hold no token."""
        index, tokens = open_data(prefix)
        ends = np.concatenate([[0], index.lengths.astype(np.int64).cumsum()])
        # A document may be stored in several pieces, and may be empty.
        starts = np.unique(ends[index.documents])
        described = split_of(prefix) or {}
        size = described.get("bytes") if described.get("tokens") == index.tokens else None
        return cls(prefix, tokens, starts[starts < index.tokens], vocabulary(prefix), size)

    @classmethod
    def encode(cls, sources: Sequence[str], text_key: str, tokenizer: Tokenizer, console: Console) -> "Stream":
        """Of files, folders and globs, in sorted order, as `weft prepare` would. Raises ValueError for what is no text.

        Says on the console what is passed over.
        """
        files = find_files(sources, suffixes())
        token_bytes, length_bytes = io.BytesIO(), io.BytesIO()
        writer, skipped = Writer(token_bytes, length_bytes, tokenizer), 0
        with counting_bytes(console, "tokenizing", sum(file.bytes for file in files)) as advance:
            for unit in units(files, text_key):
                for document in documents(unit, text_key):
                    if document is None:
                        skipped += 1
                    else:
                        writer.add(document)
                advance(unit.size)
        writer.flush()
        name = sources[0] if len(sources) == 1 else f"{len(files)} files"
        if not writer.documents:
            raise ValueError(f"{name} holds no text: {skipped} documents are empty or not UTF-8; give other files")
        if skipped:
            say(console, f"warning: documents passed over, because they are empty or not UTF-8: {skipped:,}")
        lengths = np.frombuffer(length_bytes.getbuffer(), dtype="<i4").astype(np.int64)
        tokens = np.frombuffer(token_bytes.getbuffer(), dtype=writer.dtype)
        return cls(name, tokens, lengths.cumsum() - lengths, tokenizer.vocab_size, writer.bytes)

    def __len__(self) -> int:
        return len(self.tokens)

    def part(self, start: int, stop: int) -> NDArray[np.int64]:
        """Tokens start..stop-1. Raises ValueError for one that is outside the vocabulary."""
        tokens = self.tokens[start:stop].astype(np.int64)
        if self.vocab_size is not None:
            refuse_outside(self.name, tokens, range(start, stop), self.vocab_size)
        return tokens

    def at(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """The tokens at places anywhere. Raises ValueError for one that is outside the vocabulary."""
        tokens = self.tokens[places].astype(np.int64)
        if self.vocab_size is not None:
            refuse_outside(self.name, tokens, places, self.vocab_size)
        return tokens

    def text_bytes(self, count: int, tokenizer: Tokenizer | None) -> int | None:
        """How many bytes of text the first `count` tokens are; None if nothing can say.

        Tokens that end a document have none. A part of the stream is decoded, where it ends in the middle of a
        character without that character.
        """
        if count == len(self) and self.bytes is not None:
            return self.bytes
        if tokenizer is None:
            return None
        size, end = 0, tokenizer.end_of_document
        for start, stop in zip(self.starts, [*self.starts[1:], len(self)], strict=True):
            if start >= count:
                break
            ids = self.part(int(start), min(int(stop), count)).tolist()
            cut = stop > count
            text = tokenizer.decode(ids[:-1] if ids and ids[-1] == end else ids)
            size += len((text.rstrip("\ufffd") if cut else text).encode())
        return size
