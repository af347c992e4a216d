"""Qwen2 and Qwen2.5, dense (Qwen team, arXiv 2407.10671): attention with biases on queries, keys and values."""

from collections.abc import Mapping
from typing import Any

from models.config import LayerConfig, LMConfig
from models.ffn.swiglu import SwiGLUConfig
from models.hf.native.qwen3 import Qwen3, window_keys, windows_of
from models.hf.parts import attention_of, first, model_keys, model_of, whole_heads


class Qwen2(Qwen3, kind="qwen2"):
    model_class = "Qwen2ForCausalLM"

    @classmethod
    def hf_config(cls, config: LMConfig) -> dict[str, Any]:
        keys = {**model_keys(config), "intermediate_size": first(config, SwiGLUConfig).hidden, **window_keys(config)}
        del keys["head_dim"]  # which the class does not have
        return keys

    @classmethod
    def lm_config(cls, fields: Mapping[str, Any]) -> LMConfig:
        ffn = SwiGLUConfig(fields["intermediate_size"])
        layers = [LayerConfig(attention_of(fields, qkv_bias=True, window=window), ffn) for window in windows_of(fields)]
        return model_of(fields, layers)

    @classmethod
    def limit(cls, config: LMConfig) -> str | None:
        return whole_heads(config, cls.kind)
