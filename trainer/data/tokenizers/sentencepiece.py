"""SentencePiece models. Those trained here lose nothing: decode(encode(text)) == text for all that UTF-8 can hold.

Characters outside the vocabulary become their bytes, no normalisation is applied, and spaces are kept as they are.
Source: Kudo & Richardson, SentencePiece, arXiv 1808.06226.
"""

import dataclasses
import hashlib
import io
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import sentencepiece

from trainer.data.tokenizer import Tokenizer

# SentencePiece writes a space as U+2581, so that a text's own U+2581 would come
# back as a space; its bytes are encoded instead.
SPACE_MARK = "\u2581"
END_OF_DOCUMENT = "<eod>"
SMALLEST = 300
# What SentencePiece says of texts that do not go with the size.
MOST = re.compile(r"Vocabulary size too high .* <= (\d+)")
LEAST = re.compile(r"smaller than required_chars\. \d+ vs (\d+)")
NOTHING = "!sentences_.empty()"
PLACE = re.compile(r"^\w+: \S+\(\d+\) \[.*?\] *")


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """How to train one.

    kind: bpe (seconds on some MB) or unigram (several times as long). sample_bytes: about how much text it is trained
    on; of more text a part is drawn.
    """

    vocab_size: int = 8192
    kind: str = "bpe"
    sample_bytes: int = 32_000_000

    def __post_init__(self) -> None:
        if self.kind not in ("bpe", "unigram"):
            raise ValueError(f"tokenizer kind is {self.kind!r}; the kinds are bpe and unigram")
        if self.vocab_size < SMALLEST:
            raise ValueError(f"vocab_size is {self.vocab_size}; 256 of it are bytes, use at least {SMALLEST}")
        if self.sample_bytes < 1:
            raise ValueError(f"sample_bytes is {self.sample_bytes}; it must be at least 1")


class SentencePiece(Tokenizer, kind="sentencepiece"):
    """From the bytes of a model file."""

    name = "tokenizer.model"

    def __init__(self, model: bytes) -> None:
        self.model, self.sha256 = model, hashlib.sha256(model).hexdigest()
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self._space_mark: list[int] | None = None
        marks = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()]
        if self.seamless and all(map(self._processor.is_byte, marks)):
            self._space_mark = marks

    @classmethod
    def what(cls) -> str:
        return "a SentencePiece model"

    @classmethod
    def reads(cls, path: Path) -> bool:
        return path.is_file()

    @classmethod
    def open(cls, path: Path) -> "SentencePiece":
        try:
            tokenizer = cls(path.read_bytes())
        except RuntimeError as error:
            raise ValueError(f"the tokenizer {path} is not a SentencePiece model; train one anew") from error
        if tokenizer.end_of_document < 0:
            raise ValueError(f"the tokenizer {path} has no end-of-sentence piece; documents need it to end with")
        return tokenizer

    @classmethod
    def train(cls, texts: Iterable[str], config: TokenizerConfig) -> "SentencePiece":
        """The same texts in the same order give the same tokenizer. Raises ValueError if they do not suit its size."""
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
            raise ValueError(refusal(str(error), config.vocab_size)) from error
        return cls(out.getvalue())

    @property
    def vocab_size(self) -> int:
        return self._processor.vocab_size()

    @property
    def end_of_document(self) -> int:
        return self._processor.eos_id()

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self._encode(text) for text in texts]

    def _encode(self, text: str) -> list[int]:
        if self._space_mark is None or SPACE_MARK not in text:
            return self._processor.encode(text)
        first, *rest = text.split(SPACE_MARK)
        ids = list(self._processor.encode(first))
        for part in rest:
            ids += self._space_mark
            ids += self._processor.encode(part)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._processor.decode(list(ids))

    def save(self, folder: Path) -> Path:
        file = folder / self.name
        file.write_bytes(self.model)
        return file


def refusal(error: str, vocab_size: int) -> str:
    """What SentencePiece says when it cannot train, as one sentence with the ways out that Weft accepts."""
    given = "give a tokenizer that exists with --tokenizer"
    if least := LEAST.search(error):
        return (
            f"the text has too many different characters for a vocabulary of {vocab_size}; use --vocab-size {least[1]} "
            f"or more, or {given}"
        )
    most = MOST.search(error)
    if most is None and NOTHING not in error:
        return f"no tokenizer can be trained on the text ({PLACE.sub('', error)}); {given}"
    smaller = f"--vocab-size {most[1]} or less, " if most and int(most[1]) >= SMALLEST else ""
    return f"the text is too small for a vocabulary of {vocab_size}; use {smaller}more text, or {given}"
