"""Formats of text files: what their documents are, and how a file is divided among workers."""

import dataclasses
from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from models.plugin import Plugin
from trainer.data.document import Document


@dataclasses.dataclass(frozen=True)
class Span:
    """Part of a file, from `start` to `stop` in what its format counts. size: about how many bytes of the file."""

    kind: str
    path: str
    start: int
    stop: int
    size: int


class Format(Plugin, slot="format", folder="trainer.data.formats"):
    """suffixes: how the names of such files end; those are taken from folders, too."""

    suffixes: ClassVar[tuple[str, ...]]

    @classmethod
    @abstractmethod
    def spans(cls, path: str, size: int, text_key: str) -> list[Span]:
        """The file as spans of about `size` bytes, in order. Raises ValueError for what is no such file."""

    @classmethod
    @abstractmethod
    def documents(cls, span: Span, text_key: str) -> Iterator[Document | None]:
        """The documents that begin in a span; None for one that is empty or no UTF-8. Raises ValueError."""

    @staticmethod
    def of_file(path: str) -> "type[Format]":
        """By the ending of its name; whatever has another is text."""
        kinds = Format.kinds()
        return next((cls for cls in kinds.values() if path.endswith(cls.suffixes)), kinds["text"])


def suffixes() -> tuple[str, ...]:
    """Of the files that are taken from folders."""
    return tuple(suffix for cls in Format.kinds().values() for suffix in cls.suffixes)


def whole(kind: str, path: str) -> Span:
    return Span(kind, path, 0, 1, Path(path).stat().st_size)
