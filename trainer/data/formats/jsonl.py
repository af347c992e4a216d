"""JSON lines: a line is an object, and its text a document."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from pydantic_core import from_json

from trainer.data.document import Document, TextDocument, open_stream, reading
from trainer.data.format import Format, Span, whole


class JsonLines(Format, kind="jsonl"):
    """Plain files are divided by bytes: a line belongs to the span in which it begins. Compressed ones stay whole."""

    suffixes = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".ndjson", ".json.gz", ".json.zst")

    @classmethod
    def spans(cls, path: str, size: int, text_key: str) -> list[Span]:
        if path.endswith((".gz", ".zst")):
            return [whole(cls.kind, path)]
        end = Path(path).stat().st_size
        cuts = [*range(0, max(1, end), size), end]
        return [Span(cls.kind, path, a, b, b - a) for a, b in itertools.pairwise(cuts)]

    @classmethod
    def documents(cls, span: Span, text_key: str) -> Iterator[Document | None]:
        compressed = span.path.endswith((".gz", ".zst"))
        with reading(span.path), open_stream(span.path) as stream:
            for position, line in lines(stream, 0 if compressed else span.start, None if compressed else span.stop):
                if line.strip():
                    yield document(line, text_key, f"{span.path}, at byte {position}")


def lines(stream: BinaryIO, start: int, stop: int | None) -> Iterator[tuple[int, bytes]]:
    """(position, line) of the lines that begin in start..stop-1."""
    position = start
    if start:
        # A line that begins at `start` itself follows a line end.
        stream.seek(start - 1)
        position += len(stream.readline()) - 1
    while stop is None or position < stop:
        line = stream.readline()
        if not line:
            return
        yield position, line
        position += len(line)


def document(line: bytes, text_key: str, where: str) -> Document | None:
    try:
        data = from_json(line)
    except ValueError as error:
        raise ValueError(f"{where}: no JSON ({error}); a line must be one object, with its text under a key") from error
    if not isinstance(data, dict) or text_key not in data:
        keys = ", ".join(data) if isinstance(data, dict) else "no keys"
        raise ValueError(f"{where}: there is no key {text_key!r}; the line has {keys}: choose with --text-key")
    text = data[text_key]
    if text is not None and not isinstance(text, str):
        raise ValueError(f"{where}: {text_key!r} is {type(text).__name__}, not text; choose with --text-key")
    try:
        return TextDocument(text) if text else None
    except UnicodeEncodeError:
        return None
