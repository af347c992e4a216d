"""Attention of OPT's form with a gate per head, or with a clipped softmax. The bias of its output is added here."""

import torch
from torch import Tensor

from models.mixers.clipped_softmax import ClippedSoftmaxConfig
from models.mixers.gated_attention import GatedAttentionConfig
from models.mixers.gates.by_head import ConstantGateConfig, SliceGateConfig, of_slices
from tests.golden.layers import run_mixer, weights

NAMES = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "out_proj"}


def run(inputs: dict[str, Tensor], params: dict[str, Tensor], config: dict) -> dict[str, Tensor]:
    heads, ours, outs = config["num_heads"], weights(params, NAMES), {}
    bias_D = ours.pop("o.bias")
    common = {"num_heads": heads, "rope": "none", "qkv_bias": True}
    if config.get("clipped_gamma") is not None:
        mixer = ClippedSoftmaxConfig(**common, gamma=config["clipped_gamma"])
    elif config["attn_gate_type"] == "unconditional_per_head":
        mixer = GatedAttentionConfig(**common, gate=ConstantGateConfig())
        ours["gated.weight"] = params["gate"]
    else:
        mixer = GatedAttentionConfig(**common, gate=SliceGateConfig())
        ours["gated.weight"] = torch.cat([params[f"gate.{h}.weight"] for h in range(heads)])
        ours["gated.bias"] = torch.cat([params[f"gate.{h}.bias"] for h in range(heads)])
        outs["gate"] = of_slices(inputs["x"], ours["gated.weight"], ours["gated.bias"]).transpose(1, 2)
    return {"y": run_mixer(mixer, ours, inputs["x"], 1e-6) + bias_D, **outs}
