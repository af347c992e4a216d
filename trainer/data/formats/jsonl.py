"""JSON lines: a line is an object, and its text a document."""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from pydantic_core import from_json

from trainer.data.document import BLOCK, Document, TextDocument, open_stream, reading
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
                if not line.strip():
                    continue
                try:
                    found = document(line, text_key)
                except ValueError as error:
                    number = line_number(span.path, position)
                    raise ValueError(f"{span.path}, line {number} (at byte {position}): {error}") from error
                yield found


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


def line_number(path: str, position: int) -> int:
    """Of the line that begins at a byte, from 1. Spans do not know it, and only errors ask."""
    count = 1
    with open_stream(path) as stream:
        while position and (data := stream.read(min(position, BLOCK))):
            count += data.count(b"\n")
            position -= len(data)
    return count


def parse(line: bytes) -> Any:
    """What a line holds. Raises ValueError if it is no JSON.

    Python's parser takes what the fast one refuses: bytes that are not UTF-8, and escapes of half a surrogate. Each
    becomes a character that UTF-8 cannot hold, which matters only if it is in the text.
    """
    try:
        return from_json(line.strip())
    except ValueError as error:
        try:
            return json.loads(line.decode(errors="surrogateescape"))
        except (ValueError, RecursionError):
            reason = str(error).replace("at line 1 column", "at column")
        raise ValueError(f"no JSON ({reason}); a line must be one object, with its text under a key") from error


def document(line: bytes, text_key: str) -> Document | None:
    """None if the text is empty or not UTF-8. Raises ValueError if the line holds no text."""
    data = parse(line)
    if not isinstance(data, dict) or text_key not in data:
        keys = ", ".join(data) if isinstance(data, dict) else "no keys"
        raise ValueError(f"there is no key {text_key!r}; the line has {keys}: choose with --text-key")
    text = data[text_key]
    if text is not None and not isinstance(text, str):
        raise ValueError(f"{text_key!r} is {type(text).__name__}, not text; choose with --text-key")
    try:
        return TextDocument(text) if text else None
    except UnicodeEncodeError:
        return None
