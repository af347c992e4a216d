"""Qwen3, dense (Qwen team, arXiv 2505.09388): attention with QK-norm, in which some layers may have a window."""

from collections.abc import Iterator, Mapping
from typing import Any

from models.config import LayerConfig, LMConfig
from models.ffn.swiglu import SwiGLUConfig
from models.hf.architecture import Architecture
from models.hf.links import Link
from models.hf.parts import attention_links, attention_of, ffn_links, first, model_keys, model_of
from models.mixers.attention import AttentionConfig


class Qwen3(Architecture, kind="qwen3"):
    model_class = "Qwen3ForCausalLM"
    harmless = frozenset({"max_window_layers"})  # layer_types says it

    @classmethod
    def hf_config(cls, config: LMConfig) -> dict[str, Any]:
        keys = {**model_keys(config), "intermediate_size": first(config, SwiGLUConfig).hidden, "attention_bias": False}
        return keys | window_keys(config)

    @classmethod
    def lm_config(cls, fields: Mapping[str, Any]) -> LMConfig:
        ffn = SwiGLUConfig(fields["intermediate_size"])
        layers = [LayerConfig(attention_of(fields, qk_norm=True, window=window), ffn) for window in windows_of(fields)]
        return model_of(fields, layers)

    @classmethod
    def layer_links(cls, layer: LayerConfig, ours: str, theirs: str) -> Iterator[Link]:
        assert isinstance(layer.mixer, AttentionConfig)
        yield from attention_links(layer.mixer, ours, theirs)
        yield from ffn_links(layer.ffn, ours, theirs)


def window_keys(config: LMConfig) -> dict[str, Any]:
    """The keys that say which layers have the one window that there is."""
    windows = [getattr(layer.mixer, "window", None) for layer in config.expanded]
    window = next((window for window in windows if window is not None), None)
    return {
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "layer_types": ["full_attention" if window is None else "sliding_attention" for window in windows],
    }


def windows_of(fields: Mapping[str, Any]) -> list[int | None]:
    """Each layer's window. Raises ValueError for a kind of layer that is neither."""
    found = []
    for kind in fields["layer_types"]:
        if kind not in ("full_attention", "sliding_attention"):
            raise ValueError(f"layer_types has {kind!r}; full_attention and sliding_attention are known")
        found.append(fields["sliding_window"] if kind == "sliding_attention" else None)
    return found
