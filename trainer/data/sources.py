"""The files that are prepared, and their division into units of work, which no number of workers changes."""

import dataclasses
import glob
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from trainer.data.format import Format, Span

# Small enough that the workers end together, large enough that a terabyte is some ten thousands.
SMALLEST, LARGEST, UNITS = 1 << 20, 32 << 20, 512


@dataclasses.dataclass(frozen=True)
class InputFile:
    """mtime: nanoseconds."""

    path: str
    bytes: int
    mtime: int


@dataclasses.dataclass(frozen=True)
class Unit:
    """What a worker does in one go: documents one after another. size: about how many bytes of the files."""

    index: int
    spans: tuple[Span, ...]

    @property
    def name(self) -> str:
        return f"{self.index:06}"

    @property
    def size(self) -> int:
        return sum(span.size for span in self.spans)


def find_files(sources: Sequence[str], suffixes: Sequence[str]) -> list[InputFile]:
    """Every file once, in sorted order. Raises ValueError for a source without any."""
    found: set[Path] = set()
    for source in sources:
        if Path(source).is_dir():
            files = [file for file in Path(source).rglob("*") if file.name.endswith(tuple(suffixes)) and file.is_file()]
        elif Path(source).is_file():
            files = [Path(source)]
        else:
            files = [Path(name) for name in glob.glob(source, recursive=True) if Path(name).is_file()]
        if not files:
            raise ValueError(
                f"{source!r} has no file; give a folder with {', '.join(suffixes)} files, a file or a glob"
            )
        found |= set(files)
    return [
        InputFile(str(file), status.st_size, status.st_mtime_ns) for file in sorted(found) for status in [file.stat()]
    ]


def fingerprint(files: Sequence[InputFile]) -> str:
    """Another one for another list of files, and for files that were written to."""
    return hashlib.sha256(json.dumps([dataclasses.astuple(file) for file in files]).encode()).hexdigest()


def units(files: Sequence[InputFile], text_key: str) -> Iterator[Unit]:
    """The files as units of about equal size, in order. Raises ValueError for a file that is not what its name says."""
    size = min(max(sum(file.bytes for file in files) // UNITS, SMALLEST), LARGEST)
    gathered: list[Span] = []
    index = 0
    for file in files:
        for span in Format.of_file(file.path).spans(file.path, size, text_key):
            gathered.append(span)
            if sum(span.size for span in gathered) >= size:
                yield Unit(index, tuple(gathered))
                gathered, index = [], index + 1
    if gathered:
        yield Unit(index, tuple(gathered))
