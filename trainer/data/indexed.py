"""Megatron's indexed datasets: PREFIX.bin holds the tokens, PREFIX.idx the length of every sequence and the documents.

.idx is little-endian: b"MMIDIDX\\0\\0"; version 1 (uint64); code of the tokens' type (uint8); number of sequences and
of document bounds (uint64 each); then each sequence's tokens (int32), its first byte in .bin (int64), and the
sequence at which each document begins, with the end as the last (int64).

Source: Megatron-core, core/datasets/indexed_dataset.py, which the tests hold this file to. It is not imported: its
builder keeps every length as a Python object, and importing it takes three seconds of every start.
"""

import dataclasses
import os
import struct
from collections.abc import Iterable
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
CODES = MappingProxyType({1: "u1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"})


@dataclasses.dataclass(frozen=True)
class Index:
    """lengths: tokens of each sequence. documents: the first sequence of each document, and the end."""

    dtype: np.dtype[Any]
    lengths: NDArray[np.int32]
    documents: NDArray[np.int64]
    tokens: int

    @property
    def bytes(self) -> int:
        """Of the .bin file."""
        return self.tokens * self.dtype.itemsize


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The type that Megatron chooses, too."""
    return np.dtype("<u2" if vocab_size < 65500 else "<i4")


def read_index(prefix: str) -> Index:
    """Read PREFIX.idx and compare it with the size of PREFIX.bin. Raises ValueError for what is missing or damaged."""
    for suffix in (".bin", ".idx"):
        if not Path(prefix + suffix).is_file():
            raise ValueError(f"the data {prefix}{suffix} does not exist; {how_to_make(prefix)}")
    size = Path(prefix + ".idx").stat().st_size
    with open(prefix + ".idx", "rb") as stream:
        head = stream.read(HEADER.size)
    if len(head) < HEADER.size:
        raise damaged(f"{prefix}.idx", f"has {size} bytes, less than a header")
    magic, version, code, sequences, bounds = HEADER.unpack(head)
    if magic != MAGIC or version != 1 or code not in CODES:
        raise damaged(f"{prefix}.idx", "does not begin as the index of a dataset does")
    expected = HEADER.size + 12 * sequences + 8 * bounds
    # Megatron's multimodal datasets add one byte per sequence.
    if size not in (expected, expected + sequences):
        raise damaged(f"{prefix}.idx", f"has {size} bytes, and {expected} by its own header")
    lengths = array(prefix, "<i4", HEADER.size, sequences)
    documents = array(prefix, "<i8", HEADER.size + 12 * sequences, bounds)
    dtype = np.dtype(CODES[code])
    index = Index(dtype, lengths, documents, int(lengths.sum(dtype=np.int64)))
    if sequences and lengths.min() < 0:
        raise damaged(f"{prefix}.idx", "has a sequence of negative length")
    if not bounds or documents[0] != 0 or documents[-1] != sequences or (np.diff(documents) < 0).any():
        raise damaged(f"{prefix}.idx", f"does not divide its {sequences} sequences into documents")
    if (found := Path(prefix + ".bin").stat().st_size) != index.bytes:
        raise damaged(f"{prefix}.bin", f"has {found} bytes, and {index.bytes} by its index")
    return index


def how_to_make(prefix: str) -> str:
    """The way out where a dataset is missing: weft prepare makes folders, in which it names the files."""
    folder = Path(prefix).parent
    if folder.name:
        return f"make it with weft prepare {folder} SOURCE ..."
    own = f"data/{Path(prefix).name}"
    return f"make data with weft prepare {own} SOURCE ... and give {own}/train"


def array(prefix: str, dtype: str, offset: int, count: int) -> NDArray[Any]:
    if not count:
        return np.zeros(0, dtype=dtype)
    return np.memmap(prefix + ".idx", dtype=dtype, mode="r", offset=offset, shape=(count,))


def damaged(file: str, how: str) -> ValueError:
    return ValueError(f"the data {file} {how}; it is damaged: restore it, or prepare it anew")


def write_index(
    file: str | os.PathLike[str], dtype: np.dtype[Any], count: int, lengths: Iterable[NDArray[np.int32]]
) -> None:
    """Write an .idx of `count` documents of one sequence each, whose lengths come in blocks, in constant memory."""
    code = next(code for code, name in CODES.items() if np.dtype(name) == dtype)
    with open(file, "wb") as stream:
        stream.write(HEADER.pack(MAGIC, 1, code, count, count + 1))
        stream.truncate(HEADER.size + 12 * count)
        with open(file, "r+b") as pointers:
            pointers.seek(HEADER.size + 4 * count)
            put_lengths(stream, pointers, lengths, dtype.itemsize)
        stream.seek(0, os.SEEK_END)
        for start in range(0, count + 1, 1 << 20):
            stream.write(np.arange(start, min(start + (1 << 20), count + 1), dtype="<i8").tobytes())


def put_lengths(stream: BinaryIO, pointers: BinaryIO, lengths: Iterable[NDArray[np.int32]], itemsize: int) -> None:
    """Two places of one file: the lengths, and where each sequence begins."""
    position = 0
    for block in lengths:
        stream.write(block.astype("<i4").tobytes())
        ends = position + block.astype(np.int64).cumsum() * itemsize
        pointers.write((ends - block.astype(np.int64) * itemsize).astype("<i8").tobytes())
        position = int(ends[-1]) if ends.size else position
