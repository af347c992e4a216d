"""Mistral (Jiang et al., arXiv 2310.06825): Llama whose queries see a window of tokens."""

from collections.abc import Mapping
from typing import Any

from models.config import LayerConfig, LMConfig
from models.ffn.swiglu import SwiGLUConfig
from models.hf.native.llama import Llama
from models.hf.parts import attention_of, first, model_keys, model_of
from models.mixers.attention import AttentionConfig


class Mistral(Llama, kind="mistral"):
    model_class = "MistralForCausalLM"

    @classmethod
    def hf_config(cls, config: LMConfig) -> dict[str, Any]:
        window, hidden = first(config, AttentionConfig).window, first(config, SwiGLUConfig).hidden
        return {**model_keys(config), "intermediate_size": hidden, "sliding_window": window}

    @classmethod
    def lm_config(cls, fields: Mapping[str, Any]) -> LMConfig:
        attention = attention_of(fields, window=fields["sliding_window"])
        layer = LayerConfig(attention, SwiGLUConfig(fields["intermediate_size"]))
        return model_of(fields, [layer] * fields["num_hidden_layers"])

    @classmethod
    def limit(cls, config: LMConfig) -> str | None:
        return None
