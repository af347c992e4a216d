"""Whether prepared data are what they were: cheap checks at the start of every run, all of it when asked."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.data.indexed import Index, damaged, read_index
from trainer.data.manifest import manifest_of, read_manifest, split_of
from trainer.data.tokenizer import Tokenizer
from trainer.durable import sha256_of_file

# Tokens that are looked at on both ends, and at once.
GLANCE, BLOCK = 4096, 1 << 24


def open_data(prefix: str) -> tuple[Index, NDArray[Any]]:
    """The index and the tokens of a pair. Raises ValueError when it is missing, or is seen to be damaged at a glance.

    That is when a size does not fit the index or the manifest, or one of the first and last tokens is outside the
    vocabulary.
    """
    index = read_index(prefix)
    if not index.tokens:
        raise ValueError(f"the data {prefix} holds no token; prepare it from other text")
    stream = np.memmap(prefix + ".bin", dtype=index.dtype, mode="r", shape=(index.tokens,))
    described = split_of(prefix) or {}
    for name, file in described.get("files", {}).items():
        size = (Path(prefix).parent / name).stat().st_size
        if size != file["bytes"]:
            raise damaged(str(Path(prefix).parent / name), f"has {size} bytes, and {file['bytes']} by its manifest")
    if "tokens" in described and described["tokens"] != index.tokens:
        raise damaged(prefix, f"has {index.tokens} tokens, and {described['tokens']} by its manifest")
    vocab_size = vocabulary(prefix)
    if vocab_size is not None:
        for first in {0, max(0, index.tokens - GLANCE)}:
            refuse_outside(prefix, stream[first : first + GLANCE], range(first, index.tokens), vocab_size)
    return index, stream


def vocabulary(prefix: str) -> int | None:
    """The size of the tokenizer's, if there is a manifest."""
    manifest = read_manifest(prefix)
    return None if manifest is None else manifest["tokenizer"].get("vocab_size")


def refuse_outside(prefix: str, tokens: NDArray[Any], places: Sequence[int] | NDArray[Any], vocab_size: int) -> None:
    """Raise ValueError for a token that the vocabulary does not have. places: of the tokens, in the data."""
    if tokens.size and (int(tokens.max()) >= vocab_size or int(tokens.min()) < 0):
        wrong = int(((tokens >= vocab_size) | (tokens < 0)).argmax())
        found = f"has token {int(tokens[wrong])} at place {int(places[wrong])}"
        raise damaged(f"{prefix}.bin", f"{found}, and the vocabulary ends at {vocab_size - 1}")


def pairs(path: str) -> list[str]:
    """The prefixes of a prepared folder, or the one that is given. Raises ValueError where there is none."""
    folder = Path(path)
    if not folder.is_dir():
        return [path]
    manifest = manifest_of(folder)
    if manifest is None:
        raise ValueError(f"{path} has no manifest.json; give a folder that weft prepare wrote, or the prefix of a pair")
    return [str(folder / name) for name in manifest["splits"]]


def verify(path: str, advance: Callable[[int], None] = lambda _: None) -> Iterator[str]:
    """A line on every pair of a folder, each read whole. Raises ValueError for the first thing that is wrong."""
    folder = Path(path)
    for prefix in pairs(path):
        index, stream = open_data(prefix)
        described, vocab_size = split_of(prefix), vocabulary(prefix)
        for name, file in (described or {}).get("files", {}).items():
            if sha256_of_file(Path(prefix).parent / name) != file["sha256"]:
                raise damaged(str(Path(prefix).parent / name), "has another SHA-256 than its manifest says")
        if vocab_size is not None:
            for first in range(0, index.tokens, BLOCK):
                block = stream[first : first + BLOCK]
                refuse_outside(prefix, block, range(first, index.tokens), vocab_size)
                advance(block.nbytes)
        documents = len(index.documents) - 1
        if described is not None and described["documents"] != documents:
            raise damaged(f"{prefix}.idx", f"has {documents} documents, and {described['documents']} by its manifest")
        kind = "as prepared" if described else "whole; without a manifest neither hashes nor vocabulary are known"
        yield f"{prefix}: {documents:,} documents, {index.tokens:,} tokens, {kind}"
    if folder.is_dir() and (manifest := manifest_of(folder)) is not None and "file" in manifest["tokenizer"]:
        tokenizer = Tokenizer.load(folder / manifest["tokenizer"]["file"])
        if tokenizer.sha256 != manifest["tokenizer"]["sha256"]:
            raise damaged(str(folder / manifest["tokenizer"]["file"]), "is another tokenizer than the manifest says")
        yield f"{folder / manifest['tokenizer']['file']}: {tokenizer.vocab_size:,} tokens, as prepared"
