"""Qwen3-Next (Qwen team, 2025): gated DeltaNet layers among layers of gated attention, with routed or plain SwiGLU.

Its norms store their weight less one, which rounds in float32, so that it is written and not read.
Shape suffixes: G groups, P rows of a group, W kernel width.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from models.config import LayerConfig, LMConfig
from models.ffn.moe import MoEConfig
from models.ffn.swiglu import SwiGLUConfig
from models.hf.architecture import FFN, MIXER, Architecture
from models.hf.links import Link, renamed
from models.hf.parts import attention_of, ffn_links, ffns_of, first, model_keys, model_of, sparse_layers, swiglu_links
from models.mixers.attention import AttentionConfig
from models.mixers.gated_deltanet import GatedDeltaNetConfig


class Centred(Link):
    """A norm's weight, stored less one. Exact for weights in [0.5, 2] (Sterbenz); others round once."""

    def to_theirs(self, ours: list[Tensor]) -> list[Tensor]:
        return [weight - 1 for weight in ours]


@dataclasses.dataclass(frozen=True)
class Woven(Link):
    """One matrix that holds, for each of `groups` heads, its rows of each of our matrices."""

    groups: int

    def to_theirs(self, ours: list[Tensor]) -> list[Tensor]:
        return [torch.cat([weight.unflatten(0, (self.groups, -1)) for weight in ours], 1).flatten(0, 1)]


class Convolution(Link):
    """One depthwise convolution over queries, keys and values one after another, [channels, 1, W]."""

    def to_theirs(self, ours: list[Tensor]) -> list[Tensor]:
        return [torch.cat([weight_GPW.flatten(0, 1) for weight_GPW in ours])[:, None]]


class Qwen3Next(Architecture, kind="qwen3_next"):
    model_class = "Qwen3NextForCausalLM"
    norm = Centred
    reads = False

    @classmethod
    def hf_config(cls, config: LMConfig) -> dict[str, Any]:
        attention, moe = first(config, AttentionConfig), first(config, MoEConfig)
        delta = first(config, GatedDeltaNetConfig).canonical(config.d_model)
        value_heads, value = delta.value_shape(config.d_model)
        keys = model_keys(config)
        share = {"partial_rotary_factor": attention.rope_fraction}
        linear = [isinstance(layer.mixer, GatedDeltaNetConfig) for layer in config.expanded]
        return {
            **keys,
            **share,
            "rope_parameters": {**keys["rope_parameters"], **share},
            "attention_bias": False,
            "layer_types": ["linear_attention" if is_linear else "full_attention" for is_linear in linear],
            "linear_num_key_heads": delta.num_heads,
            "linear_num_value_heads": value_heads,
            "linear_key_head_dim": delta.head_dim,
            "linear_value_head_dim": value,
            "linear_conv_kernel_dim": delta.conv_size,
            "shared_expert_intermediate_size": moe.shared_hidden,
            "intermediate_size": first(config, SwiGLUConfig).hidden,
            **sparse_layers(config),
        }

    @classmethod
    def lm_config(cls, fields: Mapping[str, Any]) -> LMConfig:
        fraction = fields["rope_parameters"]["partial_rotary_factor"]
        attention = attention_of(fields, qk_norm=True, output_gate=True, rope_fraction=fraction)
        delta = GatedDeltaNetConfig(
            num_heads=fields["linear_num_key_heads"],
            num_value_heads=fields["linear_num_value_heads"],
            head_dim=fields["linear_key_head_dim"],
            expand_v=fields["linear_value_head_dim"] / fields["linear_key_head_dim"],
            conv_size=fields["linear_conv_kernel_dim"],
        )
        ffns = ffns_of(fields, shared_hidden=fields["shared_expert_intermediate_size"], shared_gate=True)
        layers = [
            LayerConfig(delta if kind == "linear_attention" else attention, ffn)
            for kind, ffn in zip(fields["layer_types"], ffns, strict=True)
        ]
        return model_of(fields, layers)

    @classmethod
    def layer_links(cls, layer: LayerConfig, ours: str, theirs: str) -> Iterator[Link]:
        if isinstance(layer.mixer, GatedDeltaNetConfig):
            yield from delta_links(layer.mixer, ours + MIXER, theirs + "linear_attn.")
        else:
            assert isinstance(layer.mixer, AttentionConfig)
            yield from gated_attention_links(layer.mixer, ours + MIXER, theirs + "self_attn.")
        yield from ffn_links(layer.ffn, ours, theirs)
        if isinstance(layer.ffn, MoEConfig):
            yield from swiglu_links(f"{ours}{FFN}shared.", theirs + "mlp.shared_expert.")
            yield from renamed({"shared_gate.weight": "shared_expert_gate.weight"}, ours + FFN, theirs + "mlp.")

    @classmethod
    def limit(cls, config: LMConfig) -> str | None:
        if any(isinstance(layer.mixer, AttentionConfig) for layer in config.expanded):
            return None
        return "no layer has mixer attention, and transformers' caches count tokens in such a layer of qwen3_next"


def gated_attention_links(attention: AttentionConfig, ours: str, theirs: str) -> Iterator[Link]:
    yield Woven((f"{ours}q.weight", f"{ours}gate.weight"), (f"{theirs}q_proj.weight",), attention.num_heads)
    yield from renamed({f"{name}.weight": f"{name}_proj.weight" for name in ("k", "v", "o")}, ours, theirs)
    for name in ("q_norm.weight", "k_norm.weight"):
        yield Centred((ours + name,), (theirs + name,))


def delta_links(delta: GatedDeltaNetConfig, ours: str, theirs: str) -> Iterator[Link]:
    for names, woven in ((("q", "k", "v", "gate"), "in_proj_qkvz"), (("beta", "decay"), "in_proj_ba")):
        yield Woven(tuple(f"{ours}{name}.weight" for name in names), (f"{theirs}{woven}.weight",), delta.num_heads)
    yield Convolution(tuple(f"{ours}conv_{name}" for name in ("q", "k", "v")), (f"{theirs}conv1d.weight",))
    names = {"norm.weight": "norm.weight", "o.weight": "out_proj.weight", "A_log": "A_log", "dt_bias": "dt_bias"}
    yield from renamed(names, ours, theirs)
