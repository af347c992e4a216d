"""What turns text into tokens and back: a file in trainer/data/tokenizers for every kind."""

import functools
import os
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Self

from models.plugin import Plugin


class Tokenizer(Plugin, slot="tokenizer", folder="trainer.data.tokenizers"):
    """A tokenizer in memory. sha256: of what decides its tokens. name: of its file or folder where Weft keeps it."""

    name: ClassVar[str]
    sha256: str

    @staticmethod
    def load(path: str | os.PathLike[str]) -> "Tokenizer":
        """Of the kind that the file or folder is. Raises ValueError when it is missing, or of no kind."""
        where = Path(path)
        if not where.exists():
            raise ValueError(f"the tokenizer {where} does not exist; give one that weft prepare wrote")
        kinds = Tokenizer.kinds().values()
        for cls in kinds:
            if cls.reads(where):
                return cls.open(where)
        known = " or ".join(cls.what() for cls in kinds)
        raise ValueError(f"the tokenizer {where} is of no known kind; give {known}")

    @classmethod
    @abstractmethod
    def what(cls) -> str:
        """A few words on what `reads` takes."""

    @classmethod
    @abstractmethod
    def reads(cls, path: Path) -> bool:
        """Whether this kind's tokenizers look like what is at `path`."""

    @classmethod
    @abstractmethod
    def open(cls, path: Path) -> Self:
        """Raises ValueError for what is damaged, or cannot end a document."""

    @abstractmethod
    def save(self, folder: Path) -> Path:
        """Write it to `folder`, so that `open` gives an equal one; returns its path."""

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """One more than the largest id, added tokens included."""

    @property
    @abstractmethod
    def end_of_document(self) -> int:
        """The id that ends every document; no text encodes to it."""

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, and nothing else: no special token, nothing cut off or filled up."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str: ...

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    @functools.cached_property
    def seamless(self) -> bool:
        """Whether a text may be encoded in pieces: some tokenizers put a space before whatever they encode."""
        return self.decode([*self.encode("a\n"), *self.encode("b")]) == "a\nb"
