"""Which documents are held out: those with the smallest hashes, so that equal documents are always on one side."""

import dataclasses
import hashlib
import math
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path

from trainer.data.document import Document
from trainer.data.format import Format
from trainer.data.sources import Unit
from trainer.data.workfiles import read_json, write_json

SPLITS = ("train", "valid")
END = 1 << 256


@dataclasses.dataclass(frozen=True)
class Split:
    """Held out are documents whose SHA-256, as a number, is below `below`, and of at most `largest` bytes."""

    below: int
    largest: float = math.inf

    def side(self, document: Document) -> str:
        held = document.size <= self.largest and int.from_bytes(document.digest, "big") < self.below
        return "valid" if held else "train"


@dataclasses.dataclass(frozen=True)
class Scanned:
    """What a unit holds. digest: of all its documents. smallest: (SHA-256, bytes) of what may be held out."""

    index: int
    documents: int
    bytes: int
    skipped: int
    digest: str
    smallest: list[tuple[str, int]]


def documents(unit: Unit, text_key: str) -> Iterator[Document | None]:
    for span in unit.spans:
        yield from Format.of_kind(span.kind).documents(span, text_key)


def scan(unit: Unit, text_key: str, wanted: int, folder: Path) -> Scanned:
    """Read a unit through, and leave in `folder` what was found; a unit that was read before is not read again.

    wanted: bytes to hold out.
    """
    file = folder / f"{unit.name}.json"
    if (known := read_json(file)) is not None:
        return Scanned(**{**known, "smallest": [tuple(pair) for pair in known["smallest"]]})
    count = size = skipped = 0
    digest = hashlib.sha256()
    found: dict[str, int] = {}
    for document in documents(unit, text_key):
        if document is None:
            skipped += 1
            continue
        count, size = count + 1, size + document.size
        digest.update(document.digest)
        if document.size <= wanted:
            found[document.digest.hex()] = document.size
            if len(found) % 4096 == 0:
                found = smallest(found.items(), wanted)
    out = Scanned(unit.index, count, size, skipped, digest.hexdigest(), list(smallest(found.items(), wanted).items()))
    write_json(file, dataclasses.asdict(out))
    return out


def smallest(candidates: Iterable[tuple[str, int]], wanted: int) -> dict[str, int]:
    """Of (SHA-256, bytes), those with the smallest hashes whose bytes reach `wanted`."""
    kept: dict[str, int] = {}
    size = 0
    for digest, length in sorted(candidates):
        if size >= wanted:
            break
        size += 0 if digest in kept else length
        kept[digest] = length
    return kept


@dataclasses.dataclass(frozen=True)
class Choice:
    """How much is held out. wanted: bytes, where it is a number of them."""

    wanted: int

    def split(self, scanned: Iterable[Scanned]) -> Split:
        raise NotImplementedError


class ValidBytes(Choice):
    """Until `wanted` is reached. Longer documents are passed over: one of them could take the whole split."""

    def split(self, scanned: Iterable[Scanned]) -> Split:
        found: dict[str, int] = {}
        for unit in scanned:
            found = smallest([*found.items(), *unit.smallest], self.wanted)
        return Split(int(max(found), 16) + 1 if found else 0, self.wanted)


@dataclasses.dataclass(frozen=True)
class ValidFraction(Choice):
    """That part of all documents, on average."""

    wanted: int = dataclasses.field(default=0, init=False)
    fraction: float = dataclasses.field(kw_only=True)

    def split(self, scanned: Iterable[Scanned]) -> Split:
        return Split(math.floor(Fraction(self.fraction) * END))
