"""What to prepare, and from that everything that the result depends on."""

import dataclasses
from typing import Any

from trainer.data.format import suffixes
from trainer.data.split import Choice, ValidBytes, ValidFraction
from trainer.data.tokenizer import Tokenizer
from trainer.data.tokenizers.huggingface import HuggingFace
from trainer.data.tokenizers.sentencepiece import TokenizerConfig

HELD_OUT = 200_000


@dataclasses.dataclass(frozen=True)
class PrepareConfig:
    """What to prepare.

    sources: folders, files and globs. tokenizer: a SentencePiece model, a Hugging Face tokenizer's folder, or how to
    train one on the training documents. suffixes: of the files taken from folders (default: of every known format).
    valid_bytes: about how much text is held out. valid_fraction: instead, what part of the documents. text_key: where
    JSON lines and Parquet rows have their text. end_of_document: a token of a Hugging Face tokenizer (default: its
    eos_token).
    """

    sources: tuple[str, ...]
    tokenizer: str | TokenizerConfig
    suffixes: tuple[str, ...] | None = None
    valid_bytes: int | None = None
    valid_fraction: float | None = None
    text_key: str = "text"
    end_of_document: str | None = None

    def __post_init__(self) -> None:
        if self.valid_bytes is not None and self.valid_fraction is not None:
            raise ValueError("valid_bytes and valid_fraction are both given; hold out by one of them")
        if self.valid_bytes is not None and self.valid_bytes < 0:
            raise ValueError(f"valid_bytes is {self.valid_bytes}; it must be at least 0, which holds out nothing")
        if self.valid_fraction is not None and not 0 < self.valid_fraction < 1:
            raise ValueError(f"valid_fraction is {self.valid_fraction}; it must lie between 0 and 1, such as 0.01")
        if self.end_of_document is not None and isinstance(self.tokenizer, TokenizerConfig):
            raise ValueError(
                "end_of_document is of a Hugging Face tokenizer, and one is to be trained; leave it out, or give a "
                "tokenizer's folder"
            )

    @property
    def choice(self) -> Choice:
        if self.valid_fraction is not None:
            return ValidFraction(fraction=self.valid_fraction)
        return ValidBytes(HELD_OUT if self.valid_bytes is None else self.valid_bytes)

    @property
    def suffixes_of_folders(self) -> tuple[str, ...]:
        return suffixes() if self.suffixes is None else self.suffixes

    def open_tokenizer(self) -> Tokenizer | None:
        """The given one; None if it is yet to be trained."""
        if isinstance(self.tokenizer, TokenizerConfig):
            return None
        tokenizer = Tokenizer.load(self.tokenizer)
        if self.end_of_document is None:
            return tokenizer
        if not isinstance(tokenizer, HuggingFace):
            raise ValueError(
                f"the tokenizer {self.tokenizer} says itself what ends a document; leave end_of_document out"
            )
        return HuggingFace(tokenizer.path, self.end_of_document)

    def arguments(self, given: Tokenizer | None) -> dict[str, Any]:
        """All that the result depends on besides the files."""
        plain = dataclasses.asdict(self)
        tokenizer = plain["tokenizer"] if given is None else {"path": self.tokenizer, "sha256": given.sha256}
        held = dataclasses.asdict(self.choice)
        return {
            "sources": list(self.sources),
            "tokenizer": tokenizer,
            "suffixes": list(self.suffixes_of_folders),
            "valid": held,
            "text_key": self.text_key,
        }
