"""Shards to one dataset, in constant memory."""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trainer.data.indexed import token_dtype, write_index
from trainer.data.shards import Shard
from trainer.durable import sha256_of_file

BLOCK = 4 << 20


def merge(shards: Sequence[Shard], split: str, folder: Path, prefix: Path, vocab_size: int) -> dict[str, Any]:
    """Write PREFIX.bin and .idx from the shards in `folder`, in their order; returns counts, sizes and hashes."""
    dtype = token_dtype(vocab_size)
    totals = {name: sum(shard.splits[split][name] for shard in shards) for name in ("documents", "tokens", "bytes")}
    digest = hashlib.sha256()
    with open(f"{prefix}.bin", "wb") as out:
        for shard in shards:
            for data in blocks(shard.file(folder, split, "bin")):
                out.write(data)
                digest.update(data)
    lengths = (
        np.frombuffer(data, dtype="<i4") for shard in shards for data in blocks(shard.file(folder, split, "len"))
    )
    write_index(f"{prefix}.idx", dtype, totals["documents"], lengths)
    hashes = {"bin": digest.hexdigest(), "idx": sha256_of_file(Path(f"{prefix}.idx"))}
    files = {
        f"{split}.{ending}": {"bytes": Path(f"{prefix}.{ending}").stat().st_size, "sha256": sha256}
        for ending, sha256 in hashes.items()
    }
    return {**totals, "files": files}


def blocks(file: Path) -> Iterator[bytes]:
    with file.open("rb") as stream:
        while data := stream.read(BLOCK):
            yield data
