"""The tokens of one unit: two files for each split, and one that says what they must be."""

import contextlib
import dataclasses
import functools
import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from trainer.data.document import PIECE, Document
from trainer.data.indexed import token_dtype
from trainer.data.sources import Unit
from trainer.data.split import SPLITS, Split, documents
from trainer.data.tokenizer import Tokenizer
from trainer.data.workfiles import publishing, read_json, write_json
from trainer.durable import sha256_of_file

# Characters that are encoded at once: enough to keep a tokenizer busy, little enough to hold.
BATCH = 1 << 20


@dataclasses.dataclass(frozen=True)
class Shard:
    """What became of a unit. splits: documents, tokens and bytes of each split, and SHA-256 of its two files."""

    index: int
    digest: str
    splits: dict[str, dict[str, Any]]

    def file(self, folder: Path, split: str, ending: str) -> Path:
        return shard_file(folder, f"{self.index:06}", split, ending)


def shard_file(folder: Path, name: str, split: str, ending: str) -> Path:
    """ending: bin for tokens, len for the lengths of documents (int32)."""
    return folder / f"{name}.{split}.{ending}"


def tokenize(unit: Unit, text_key: str, split: Split, tokenizer_path: str, folder: Path) -> Shard:
    """Write a unit's shard to `folder`, unless a whole one is there."""
    name = folder / f"{unit.name}.json"
    if (known := kept(name, folder)) is not None:
        return known
    tokenizer = loaded(tokenizer_path)
    digest = hashlib.sha256()
    with contextlib.ExitStack() as stack:
        sides = {side: stack.enter_context(writing(folder, unit.name, side, tokenizer)) for side in SPLITS}
        for document in documents(unit, text_key):
            if document is not None:
                digest.update(document.digest)
                sides[split.side(document)].add(document)
    shard = Shard(unit.index, digest.hexdigest(), {side: writer.described() for side, writer in sides.items()})
    write_json(name, dataclasses.asdict(shard))
    return shard


def kept(file: Path, folder: Path) -> Shard | None:
    """The shard that was written before, if its files are what they were."""
    data = read_json(file)
    if data is None:
        return None
    shard = Shard(**data)
    for side, split in shard.splits.items():
        for ending, sha256 in split["sha256"].items():
            part = shard.file(folder, side, ending)
            if not part.is_file() or sha256_of_file(part) != sha256:
                return None
    return shard


@functools.cache
def loaded(path: str) -> Tokenizer:
    """Once in each worker."""
    return Tokenizer.load(path)


class Writer:
    """Encodes documents in batches, and writes their tokens and lengths."""

    def __init__(self, tokens: BinaryIO, lengths: BinaryIO, tokenizer: Tokenizer) -> None:
        self._streams = {"bin": tokens, "len": lengths}
        self._hashes = {ending: hashlib.sha256() for ending in self._streams}
        self._tokenizer = tokenizer
        self._limit = PIECE if tokenizer.seamless else sys.maxsize
        self.dtype = token_dtype(tokenizer.vocab_size)
        self._pieces: list[str] = []
        self._last: list[bool] = []
        self._waiting = 0
        self._length = 0
        self.documents = self.tokens = self.bytes = 0

    def add(self, document: Document) -> None:
        self.documents, self.bytes = self.documents + 1, self.bytes + document.size
        for piece in document.pieces(self._limit):
            self._pieces.append(piece)
            self._last.append(False)
            self._waiting += len(piece)
            if self._waiting >= BATCH:
                self.flush()
        if self._last:
            self._last[-1] = True
        else:
            # The document's last piece filled a batch.
            self._write([], ends=True)

    def flush(self) -> None:
        """Encode what is waiting."""
        found = self._tokenizer.encode_batch(self._pieces)
        for ids, ends in zip(found, self._last, strict=True):
            self._write(ids, ends)
        self._pieces, self._last, self._waiting = [], [], 0

    def _write(self, ids: list[int], ends: bool) -> None:
        data = np.array([*ids, self._tokenizer.end_of_document] if ends else ids, dtype=self.dtype)
        self._put("bin", data.tobytes())
        self._length += data.size
        if ends:
            if self._length > np.iinfo(np.int32).max:
                raise ValueError(
                    f"a document has {self._length:,} tokens; the index of a dataset counts up to 2**31 - 1: divide it"
                )
            self._put("len", np.array(self._length, dtype="<i4").tobytes())
            self.tokens, self._length = self.tokens + self._length, 0

    def _put(self, ending: str, data: bytes) -> None:
        self._streams[ending].write(data)
        self._hashes[ending].update(data)

    def described(self) -> dict[str, Any]:
        sha256 = {ending: digest.hexdigest() for ending, digest in self._hashes.items()}
        return {"documents": self.documents, "tokens": self.tokens, "bytes": self.bytes, "sha256": sha256}


@contextlib.contextmanager
def writing(folder: Path, name: str, split: str, tokenizer: Tokenizer) -> Iterator[Writer]:
    """A writer of one split of a shard, whose files get their names when all is written."""
    with (
        publishing(shard_file(folder, name, split, "bin")) as tokens,
        publishing(shard_file(folder, name, split, "len")) as lengths,
        tokens.open("wb") as token_stream,
        lengths.open("wb") as length_stream,
    ):
        writer = Writer(token_stream, length_stream, tokenizer)
        yield writer
        writer.flush()
