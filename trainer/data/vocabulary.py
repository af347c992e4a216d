"""Whether the tokens of all data of a run are in its model's vocabulary, as far as can be seen before it starts."""

import numpy as np

from trainer.config import RunConfig
from trainer.data.check import GLANCE, open_data
from trainer.data.manifest import read_manifest

# Places of a dataset without a manifest that are looked at.
PLACES = 64


def refuse_vocabulary(config: RunConfig) -> None:
    """Raise ValueError when the model's vocabulary is smaller than the data's, or the data's are not one.

    What has no manifest is read at places that are spread evenly over it.
    """
    prefixes = [source.path for source in config.data.sources]
    tokenizers: dict[str, str] = {}
    for prefix in [*prefixes, config.data.valid] if config.data.valid else prefixes:
        manifest = read_manifest(prefix)
        if manifest is None:
            refuse_tokens(prefix, config.model.vocab_size)
            continue
        tokenizer = manifest["tokenizer"]
        if tokenizer["vocab_size"] > config.model.vocab_size:
            raise ValueError(
                f"model.vocab_size is {config.model.vocab_size} and the data's tokenizer has {tokenizer['vocab_size']} "
                f"pieces; use at least {tokenizer['vocab_size']}"
            )
        tokenizers[prefix] = tokenizer["sha256"]
    for prefix, sha256 in tokenizers.items():
        first = next(iter(tokenizers))
        if sha256 != tokenizers[first]:
            raise ValueError(f"{first} and {prefix} were made with different tokenizers; prepare them with one")


def refuse_tokens(prefix: str, vocab_size: int) -> None:
    """Raise ValueError for a token outside the vocabulary, at the places that are looked at."""
    index, stream = open_data(prefix)
    for first in np.unique(np.linspace(0, max(0, index.tokens - GLANCE), PLACES, dtype=np.int64)):
        tokens = stream[first : first + GLANCE]
        for token in (int(tokens.min()), int(tokens.max())):
            if not 0 <= token < vocab_size:
                way_out = f"use at least {token + 1}, or other data" if token >= 0 else "use other data"
                raise ValueError(f"model.vocab_size is {vocab_size} and {prefix} has the token {token}; {way_out}")
