"""Llama (Touvron et al., arXiv 2302.13971): grouped-query attention, half-rotated positions, SwiGLU, pre-norm."""

from collections.abc import Iterator, Mapping
from typing import Any

from models.config import LayerConfig, LMConfig
from models.ffn.swiglu import SwiGLUConfig
from models.hf.architecture import Architecture
from models.hf.links import Link
from models.hf.parts import attention_links, attention_of, ffn_links, first, model_keys, model_of, whole_heads
from models.mixers.attention import AttentionConfig


class Llama(Architecture, kind="llama"):
    model_class = "LlamaForCausalLM"

    @classmethod
    def hf_config(cls, config: LMConfig) -> dict[str, Any]:
        hidden = first(config, SwiGLUConfig).hidden
        return {**model_keys(config), "intermediate_size": hidden, "attention_bias": False, "mlp_bias": False}

    @classmethod
    def lm_config(cls, fields: Mapping[str, Any]) -> LMConfig:
        layer = LayerConfig(attention_of(fields), SwiGLUConfig(fields["intermediate_size"]))
        return model_of(fields, [layer] * fields["num_hidden_layers"])

    @classmethod
    def layer_links(cls, layer: LayerConfig, ours: str, theirs: str) -> Iterator[Link]:
        assert isinstance(layer.mixer, AttentionConfig)
        yield from attention_links(layer.mixer, ours, theirs)
        yield from ffn_links(layer.ffn, ours, theirs)

    @classmethod
    def limit(cls, config: LMConfig) -> str | None:
        return whole_heads(config, cls.kind)
