"""From text files to tokens.

OUT gets tokenizer.model, train.bin/.idx, valid.bin/.idx and manifest.json. It is written under another name and renamed
at the end, so that an interrupted run leaves nothing that looks complete. Whole files are held out, chosen by the hash
of their text: the same files give the same split wherever they lie, and equal files are never on both sides.
"""

import contextlib
import dataclasses
import glob
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from trainer.data.indexed import DType, IndexedDatasetBuilder
from trainer.data.manifest import MANIFEST
from trainer.data.tokenizer import Tokenizer, TokenizerConfig
from trainer.durable import sha256_of_file, sync_file, sync_folder

SPLITS = ("train", "valid")


@dataclasses.dataclass(frozen=True)
class PrepareConfig:
    """What to prepare.

    sources: folders and globs. suffixes: of the files taken from folders. tokenizer: a file, or how to train one on
    the training files. valid_bytes: about how much text is held out.
    """

    sources: tuple[str, ...]
    tokenizer: str | TokenizerConfig
    suffixes: tuple[str, ...] = (".txt", ".md", ".py")
    valid_bytes: int = 200_000


@dataclasses.dataclass(frozen=True)
class Document:
    path: Path
    bytes: int
    sha256: str


def find_files(sources: Sequence[str], suffixes: Sequence[str]) -> list[Path]:
    """Every file once, in sorted order. Raises ValueError for a source without any."""
    found: set[Path] = set()
    for source in sources:
        if Path(source).is_dir():
            files = [file for file in Path(source).rglob("*") if file.suffix in suffixes and file.is_file()]
        elif Path(source).is_file():
            files = [Path(source)]
        else:
            files = [Path(name) for name in glob.glob(source, recursive=True) if Path(name).is_file()]
        if not files:
            raise ValueError(
                f"{source!r} has no file; give a folder with {', '.join(suffixes)} files, a file or a glob"
            )
        found |= set(files)
    return sorted(found)


def read_text(path: Path) -> str | None:
    """The text byte for byte (line ends are kept), or None when it is not UTF-8."""
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        return None


def describe(files: Sequence[Path]) -> list[Document]:
    """The files that hold UTF-8 text."""
    found = []
    for path in files:
        data = path.read_bytes()
        if data and read_text(path) is not None:
            found.append(Document(path, len(data), hashlib.sha256(data).hexdigest()))
    return found


def split(documents: Sequence[Document], valid_bytes: int) -> dict[str, list[Document]]:
    """Hold out the files whose hashes are smallest until valid_bytes is reached; at least one file stays for training.

    Files larger than what is wanted are passed over, so that one of them cannot take the whole split.
    """
    held: set[str] = set()
    size = 0
    for document in sorted(documents, key=lambda document: document.sha256):
        if size >= valid_bytes:
            break
        if document.sha256 not in held and document.bytes <= valid_bytes:
            held.add(document.sha256)
            size += document.bytes
    sides = {
        "train": [document for document in documents if document.sha256 not in held],
        "valid": [document for document in documents if document.sha256 in held],
    }
    for name, side in sides.items():
        if not side:
            raise ValueError(
                f"{len(documents)} text files with {valid_bytes} bytes held out leave none for {name}; "
                "give more files, or another valid_bytes"
            )
    return sides


def write_split(
    prefix: Path, documents: Sequence[Document], tokenizer: Tokenizer, advance: Callable[[], None]
) -> dict[str, Any]:
    """Write one .bin/.idx pair; returns its counts and hashes."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(tokenizer.vocab_size))
    tokens = size = 0
    with contextlib.closing(builder.data_file):
        for document in documents:
            text = read_text(document.path)
            if text is None or hashlib.sha256(text.encode()).hexdigest() != document.sha256:
                raise ValueError(f"{document.path} was changed while it was read; start again")
            ids = tokenizer.encode_document(text)
            builder.add_item(torch.tensor(ids))
            builder.end_document()
            tokens, size = tokens + len(ids), size + document.bytes
            advance()
        builder.finalize(f"{prefix}.idx")
    hashes = {suffix: sha256_of_file(Path(f"{prefix}.{suffix}")) for suffix in ("bin", "idx")}
    return {"documents": len(documents), "tokens": tokens, "bytes": size, "sha256": hashes}


def prepare(config: PrepareConfig, out: str | os.PathLike[str], console: Console | None = None) -> dict[str, Any]:
    """Write the prepared data to folder `out`, which must not exist; returns its manifest."""
    console = console or Console(stderr=True)
    out = Path(out)
    if out.exists():
        raise ValueError(f"{out} already exists; remove it, or give another folder")
    files = find_files(config.sources, config.suffixes)
    documents = describe(files)
    sides = split(documents, config.valid_bytes)
    staging = out.with_name(out.name + ".partial")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    if isinstance(config.tokenizer, TokenizerConfig):
        texts = (read_text(document.path) or "" for document in sides["train"])
        tokenizer = Tokenizer.train(texts, config.tokenizer)
    else:
        tokenizer = Tokenizer.load(config.tokenizer)
    tokenizer.save(staging / "tokenizer.model")
    columns = (TextColumn("{task.description}"), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("tokenizing", total=len(documents))
        splits = {
            name: write_split(staging / name, sides[name], tokenizer, lambda: progress.advance(task)) for name in SPLITS
        }
    manifest = {
        "format": 1,
        "tokenizer": {
            "file": "tokenizer.model",
            "sha256": tokenizer.sha256,
            "vocab_size": tokenizer.vocab_size,
            "end_of_document": tokenizer.end_of_document,
        },
        "splits": splits,
        "skipped": len(files) - len(documents),
    }
    (staging / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    for file in staging.iterdir():
        sync_file(file)
    sync_folder(staging)
    staging.rename(out)
    sync_folder(out.parent)
    return manifest
