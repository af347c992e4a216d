"""MUDD: one depth aggregate, and whole models whose FFN width differs from layer to layer."""

import string

import torch
from torch import nn

from models.config import LayerConfig, LMConfig
from models.ffn.swiglu import SwiGLUConfig
from models.lm import LM
from models.mixers.attention import AttentionConfig
from models.norms.pre import PreNorm
from models.residual.mudd import DepthAggregate, MUDDConnections
from tests.connections import Params, call

NAMES = {
    "mixer.branch.mixer.q": "attention.wq",
    "mixer.branch.mixer.k": "attention.wk",
    "mixer.branch.mixer.v": "attention.wv",
    "mixer.branch.mixer.o": "attention.wo",
    "mixer.branch.mixer.q_norm": "attention.q_norm",
    "mixer.branch.mixer.k_norm": "attention.k_norm",
    "mixer.placement.norms.0": "attention_norm",
    "ffn.placement.norms.0": "ffn_norm",
    "ffn.branch.ffn.gate": "feed_forward.w1",
    "ffn.branch.ffn.up": "feed_forward.w3",
    "ffn.branch.ffn.down": "feed_forward.w2",
}


class Traced(nn.Module):
    """An aggregate with its weights."""

    def __init__(self, aggregate: DepthAggregate) -> None:
        super().__init__()
        self.aggregate = aggregate

    def forward(self, sources: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        return self.aggregate.weights(sources[-1]).permute(2, 0, 1, 3), torch.stack(self.aggregate(sources))


def mudd(config: dict) -> MUDDConnections:
    return MUDDConnections(
        separate_norms=config.get("sepln", True),
        hidden_round=64 if config.get("round64") else None,
        expand_last=4 if config.get("expand_last") else 1,
        eps=config["norm_eps"],
    )


def run(inputs: Params, params: Params, config: dict) -> Params:
    if "hiddens" not in inputs:
        return model(inputs, params, config)
    sources = list(inputs["hiddens"].unbind())
    aggregate = mudd(config).aggregate(config["D"], config["ways"], len(sources))
    mapped = {
        "aggregate.down.weight": params["w1.weight"],
        "aggregate.up.weight": params["w2.weight"],
        "aggregate.static": params["static"],
    }
    dw, mixed = call(Traced(aggregate), mapped, sources)
    return {"dw": dw, "mixed": mixed}


def model(inputs: Params, params: Params, config: dict) -> Params:
    depth, heads = config["n_layer"], config["n_head"]
    head_dim = config["dim"] // heads
    kv_heads = params["layers.0.attention.wk.weight"].shape[0] // head_dim
    attention = AttentionConfig(heads, kv_heads, head_dim, qk_norm=config.get("use_qk_norm", False))
    letters = string.ascii_letters[:depth]
    ffns = [SwiGLUConfig(hidden) for hidden in config["ffn_hidden"]]
    lm = LM(
        LMConfig(
            vocab_size=config["vocab_size"],
            d_model=config["dim"],
            layers={letter: LayerConfig(attention, ffn) for letter, ffn in zip(letters, ffns, strict=True)},
            pattern=letters,
            residual=mudd(config),
            norm=PreNorm(config["norm_eps"]),
        )
    )
    mapped = {
        "embed.weight": params["tok_embeddings.weight"],
        "norm.weight": params["norm.weight"],
        "head.weight": params["output.weight"],
    }
    for index in range(depth):
        names = [*NAMES.items(), *((f"mixer.placement.norms.{way}", f"attention_norms.{way}") for way in range(3))]
        for ours, theirs in names:
            if f"layers.{index}.{theirs}.weight" in params:
                mapped[f"layers.{index}.{ours}.weight"] = params[f"layers.{index}.{theirs}.weight"]
        home = "closer" if index == depth - 1 else f"layers.{index + 1}.mixer.connection"
        mapped[f"{home}.aggregate.static"] = params[f"dense_bs.{index}"]
        mapped[f"{home}.aggregate.down.weight"] = params[f"dynamic_dense.{index}.w1.weight"]
        mapped[f"{home}.aggregate.up.weight"] = params[f"dynamic_dense.{index}.w2.weight"]
    return {"logits": call(lm, mapped, inputs["input_ids"]).logits}
