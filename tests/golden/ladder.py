"""Ladder residual: whole Llama models with some or all layers on the ladder, and the topology alone."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.config import LayerConfig, LMConfig
from models.ffn.swiglu import SwiGLUConfig
from models.lm import LM
from models.mixers.attention import AttentionConfig
from models.norms.pre import PreNorm
from models.residual.ladder import LadderResidual
from tests.connections import Params, apply, call, causal_mean, context

NAMES = {
    "mixer.placement.norms.0": "input_layernorm",
    "mixer.branch.mixer.q": "self_attn.q_proj",
    "mixer.branch.mixer.k": "self_attn.k_proj",
    "mixer.branch.mixer.v": "self_attn.v_proj",
    "mixer.branch.mixer.o": "self_attn.o_proj",
    "ffn.placement.norms.0": "post_attention_layernorm",
    "ffn.branch.ffn.gate": "mlp.gate_proj",
    "ffn.branch.ffn.up": "mlp.up_proj",
    "ffn.branch.ffn.down": "mlp.down_proj",
}


def run(inputs: Params, params: Params, config: dict) -> Params:
    return llama(inputs, params, config) if "ladder_layers" in config else topology(inputs, params, config)


def llama(inputs: Params, params: Params, config: dict) -> Params:
    layers = config["num_hidden_layers"]
    attention = AttentionConfig(
        config["num_attention_heads"], config["num_key_value_heads"], rope_theta=config["rope_theta"]
    )
    model = LM(
        LMConfig(
            vocab_size=config["vocab_size"],
            d_model=config["hidden_size"],
            layers={"A": LayerConfig(attention, SwiGLUConfig(config["intermediate_size"]))},
            pattern="A",
            repeat=layers,
            residual=LadderResidual(tuple(config["ladder_layers"])),
            norm=PreNorm(config["rms_norm_eps"]),
        )
    )
    mapped = {
        "embed.weight": params["model.embed_tokens.weight"],
        "norm.weight": params["model.norm.weight"],
        "head.weight": params["lm_head.weight"],
    }
    for index in range(layers):
        for ours, theirs in NAMES.items():
            mapped[f"layers.{index}.{ours}.weight"] = params[f"model.layers.{index}.{theirs}.weight"]
    return {"logits": call(model, mapped, inputs["input_ids"]).logits}


def topology(inputs: Params, params: Params, config: dict) -> Params:
    width, eps, factor = inputs["x"].shape[-1], config["eps"], config["m_residual"] or 1.0
    kind = LadderResidual()
    state = kind.open(width)(inputs["x"])
    for index in range(config["layers"]):
        own = {k.removeprefix(f"h.{index}."): p for k, p in params.items() if k.startswith(f"h.{index}.")}

        def mix(u: Tensor, own: Params = own) -> Tensor:
            normed = F.rms_norm(u, (width,), own["ln_1.weight"], eps)
            return factor * torch.tanh(F.linear(causal_mean(normed), own["sequence_mixer.w"]))

        def feed(u: Tensor, own: Params = own) -> Tensor:
            normed = F.rms_norm(u, (width,), own["ln_2.weight"], eps)
            return factor * torch.tanh(F.linear(normed, own["mlp_block.w"]))

        place = context(width, index, config["layers"])
        state = apply(kind.connect(place, "mixer", nn.Identity()), {}, state, mix)
        state = apply(kind.connect(place, "ffn", nn.Identity()), {}, state, feed)
    final = PreNorm(eps).final(width)
    return {"y": call(final, {"weight": params["ln_f.weight"]}, kind.close(width, config["layers"])(state))}
