"""The Hugging Face config of an exported model: what tools look for, and the whole Weft config under `weft`."""

from typing import Any

from transformers import PreTrainedConfig


class WeftConfig(PreTrainedConfig):
    """weft: an `LMConfig` as plain data, with every default written out. The other fields repeat parts of it."""

    model_type = "weft"
    keys_to_ignore_at_inference = ("past_key_values",)

    weft: dict[str, Any] | None = None
    vocab_size: int | None = None
    hidden_size: int | None = None
    num_hidden_layers: int | None = None
    max_position_embeddings: int | None = None
    tie_word_embeddings: bool = False
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
