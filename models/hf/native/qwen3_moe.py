"""Qwen3-MoE (Qwen team, arXiv 2505.09388): Qwen3's attention before routed SwiGLU experts, or SwiGLU in some layers."""

from collections.abc import Mapping
from typing import Any

from models.config import LayerConfig, LMConfig
from models.hf.native.qwen3 import Qwen3
from models.hf.parts import attention_of, ffns_of, first, model_keys, model_of, sparse_layers
from models.mixers.attention import AttentionConfig


class Qwen3MoE(Qwen3, kind="qwen3_moe"):
    model_class = "Qwen3MoeForCausalLM"
    harmless = frozenset({"decoder_sparse_step", "mlp_only_layers", "intermediate_size", "head_dim"})

    @classmethod
    def hf_config(cls, config: LMConfig) -> dict[str, Any]:
        window = first(config, AttentionConfig).window
        keys = {"attention_bias": False, "use_sliding_window": window is not None, "sliding_window": window}
        return {**model_keys(config), **keys, **sparse_layers(config)}

    @classmethod
    def lm_config(cls, fields: Mapping[str, Any]) -> LMConfig:
        attention = attention_of(fields, qk_norm=True, window=fields["sliding_window"])
        return model_of(fields, [LayerConfig(attention, ffn) for ffn in ffns_of(fields)])
