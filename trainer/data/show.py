"""What prepared data hold, in a few lines."""

from collections.abc import Iterator
from pathlib import Path

from trainer.data.check import open_data, pairs
from trainer.data.manifest import read_manifest, split_of
from trainer.data.tokenizer import Tokenizer

# Of the text that is shown.
TOKENS, CHARACTERS = 48, 100


def describe(path: str) -> Iterator[str]:
    """Raises ValueError for what is missing, or damaged at a glance."""
    tokenizer = None
    manifest = read_manifest(pairs(path)[0])
    if manifest is not None and "file" in manifest["tokenizer"]:
        file = Path(pairs(path)[0]).parent / manifest["tokenizer"]["file"]
        tokenizer = Tokenizer.load(file)
        end = tokenizer.decode([tokenizer.end_of_document]) or tokenizer.end_of_document
        yield f"{file}: {tokenizer.kind}, {tokenizer.vocab_size:,} tokens, documents end with {end!r}"
    for prefix in pairs(path):
        index, stream = open_data(prefix)
        documents, text = len(index.documents) - 1, (split_of(prefix) or {}).get("bytes")
        size = f", {text:,} bytes of text, {text / index.tokens:.2f} bytes per token" if text else ""
        yield f"{prefix}: {documents:,} documents, {index.tokens:,} tokens of {index.dtype}{size}"
        if tokenizer is not None:
            shown = tokenizer.decode(stream[:TOKENS].tolist())
            yield f"  begins {shown[:CHARACTERS]!r}"
