"""A SentencePiece tokenizer that loses nothing: decode(encode(text)) == text for every text that UTF-8 can hold.

Characters outside the vocabulary become their bytes, no normalisation is applied, and spaces are kept as they are.
Source: Kudo & Richardson, SentencePiece, arXiv 1808.06226.
"""

import dataclasses
import hashlib
import io
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import sentencepiece

# SentencePiece writes a space as U+2581, so that a text's own U+2581 would come
# back as a space; its bytes are encoded instead.
SPACE_MARK = "\u2581"
END_OF_DOCUMENT = "<eod>"


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """How to train one. kind: bpe (seconds on some MB) or unigram (several times as long)."""

    vocab_size: int = 8192
    kind: str = "bpe"

    def __post_init__(self) -> None:
        if self.kind not in ("bpe", "unigram"):
            raise ValueError(f"tokenizer kind is {self.kind!r}; the kinds are bpe and unigram")
        if self.vocab_size < 300:
            raise ValueError(f"vocab_size is {self.vocab_size}; 256 of it are bytes, use at least 300")


class Tokenizer:
    """A trained tokenizer, from the bytes of its model file."""

    def __init__(self, model: bytes) -> None:
        self.model = model
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self._space_mark = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()]

    @classmethod
    def load(cls, file: str | os.PathLike[str]) -> "Tokenizer":
        """Raises ValueError when the file is missing or no SentencePiece model."""
        path = Path(file)
        if not path.is_file():
            raise ValueError(f"the tokenizer {path} does not exist; train one with weft prepare")
        try:
            return cls(path.read_bytes())
        except RuntimeError as error:
            raise ValueError(f"the tokenizer {path} is not a SentencePiece model; train one anew") from error

    @classmethod
    def train(cls, texts: Iterable[str], config: TokenizerConfig) -> "Tokenizer":
        """The same texts in the same order give the same tokenizer. Raises ValueError when they are too few."""
        out = io.BytesIO()
        sentencepiece.set_random_generator_seed(0)
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=(line for text in texts for line in text.splitlines(keepends=True)),
                model_writer=out,
                model_type=config.kind,
                vocab_size=config.vocab_size,
                byte_fallback=True,
                normalization_rule_name="identity",
                remove_extra_whitespaces=False,
                add_dummy_prefix=False,
                allow_whitespace_only_pieces=True,
                split_digits=True,
                unk_id=0,
                eos_id=1,
                bos_id=-1,
                pad_id=-1,
                eos_piece=END_OF_DOCUMENT,
                max_sentence_length=1 << 20,
                num_threads=2,
                minloglevel=2,
            )
        except RuntimeError as error:
            raise ValueError(
                f"the texts do not fill a vocabulary of {config.vocab_size} pieces; use a smaller vocab_size, "
                f"or more text (SentencePiece says: {error})"
            ) from error
        return cls(out.getvalue())

    @property
    def vocab_size(self) -> int:
        return self._processor.vocab_size()

    @property
    def end_of_document(self) -> int:
        """The id that ends every document; no text encodes to it."""
        return self._processor.eos_id()

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.model).hexdigest()

    def encode(self, text: str) -> list[int]:
        first, *rest = text.split(SPACE_MARK)
        ids = list(self._processor.encode(first))
        for part in rest:
            ids += self._space_mark
            ids += self._processor.encode(part)
        return ids

    def encode_document(self, text: str) -> list[int]:
        """The text's tokens and the end of the document."""
        return [*self.encode(text), self.end_of_document]

    def decode(self, ids: Sequence[int]) -> str:
        return self._processor.decode(list(ids))

    def save(self, file: str | os.PathLike[str]) -> None:
        Path(file).write_bytes(self.model)
