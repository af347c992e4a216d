"""Whether a tokenizer, and data that one made, are those of a model."""

import dataclasses
from pathlib import Path

from models.hf.tokenizer import SAMPLE
from trainer.data.manifest import read_manifest
from trainer.data.stream import Stream
from trainer.data.tokenizer import Tokenizer


def fitting_tokenizer(path: str | None, model: str, vocab_size: int) -> Tokenizer:
    """The tokenizer at `path`, for the model of that vocabulary. Raises ValueError where it is missing or too large."""
    if path is None:
        raise ValueError(f"{model} names no tokenizer, so that text and tokens cannot meet; give --tokenizer PATH")
    tokenizer = Tokenizer.load(path)
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"the tokenizer {path} has {tokenizer.vocab_size} pieces and the model {model} a vocabulary of "
            f"{vocab_size}; give the tokenizer that the model was trained with"
        )
    return tokenizer


def refuse_other(prefix: str, tokenizer: Tokenizer, path: str) -> None:
    """Raise ValueError for data that say they were made with another tokenizer than that at `path`."""
    described = (read_manifest(prefix) or {}).get("tokenizer", {})
    if not described or described.get("sha256") == tokenizer.sha256:
        return
    made_by = Path(prefix).parent / str(described.get("file"))
    if made_by.exists():
        other = not agree(Tokenizer.load(made_by), tokenizer)
    else:
        other = described.get("kind") == tokenizer.kind or described.get("vocab_size") != tokenizer.vocab_size
    if other:
        raise ValueError(
            f"the data {prefix} were made with another tokenizer than {path}; give data that the model's made"
        )


def agree(one: Tokenizer, other: Tokenizer) -> bool:
    """Whether texts become the same tokens: one that was exported has another format, and so another hash."""
    return one.end_of_document == other.end_of_document and one.encode(SAMPLE) == other.encode(SAMPLE)


def fitting_stream(prefix: str, model: str, vocab_size: int, tokenizer: str | None) -> tuple[Stream, Tokenizer | None]:
    """Prepared data, and the tokenizer that made them, if it is there. tokenizer: the model's, if known.

    Raises ValueError for tokens that the model does not have, and for those of another tokenizer.
    """
    stream = Stream.open(prefix)
    if stream.vocab_size is not None and stream.vocab_size > vocab_size:
        raise ValueError(
            f"the data {prefix} were made with a tokenizer of {stream.vocab_size} pieces and the model {model} has a "
            f"vocabulary of {vocab_size}; give data that the model's tokenizer made"
        )
    own = None
    if tokenizer is not None and Path(tokenizer).exists():
        own = Tokenizer.load(tokenizer)
        refuse_other(prefix, own, tokenizer)
    # Data from elsewhere say nothing of their vocabulary, and the model has no row for what is outside its own.
    known = stream if stream.vocab_size is not None else dataclasses.replace(stream, vocab_size=vocab_size)
    return known, own
