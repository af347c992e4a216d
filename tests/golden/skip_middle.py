"""Skip-middle: whole models, with the key gate of the paper and without it, as in the released code."""

import torch
from torch import Tensor

from models.config import LayerConfig, LMConfig
from models.depth.skip_middle import SkipMiddleDepth, UngatedKeysSkipMiddleDepth
from models.ffn.swiglu import SwiGLUConfig
from models.lm import LM
from models.mixers.attention import AttentionConfig
from models.norms.peri import PeriNorm

NAMES = {
    "tok_embeddings.": "embed.",
    "input_norm.": "embed_norm.",
    "output_norm.": "norm.",
    "output.": "head.",
    "pre_attention_norm.": "mixer.placement.norms.0.",
    "post_attention_norm.": "mixer.placement.out_norm.",
    "pre_feed_forward_norm.": "ffn.placement.norms.0.",
    "post_feed_forward_norm.": "ffn.placement.out_norm.",
    "attention.w": "mixer.branch.mixer.",
    "feed_forward.w1.": "ffn.branch.ffn.gate.",
    "feed_forward.w2.": "ffn.branch.ffn.down.",
    "feed_forward.w3.": "ffn.branch.ffn.up.",
    "masks.": "layers.",
    "linear.": "depth.proj.",
}


def run(inputs: dict[str, Tensor], params: dict[str, Tensor], config: dict) -> dict[str, Tensor]:
    on_keys = config.get("gate_bias_axis", "query") == "key"
    attention = AttentionConfig(
        num_heads=config["n_heads"],
        num_kv_heads=config["n_kv_heads"],
        rope="interleaved",
        rope_theta=float(config["rope_theta"]),
    )
    with torch.device("meta"):
        model = LM(
            LMConfig(
                vocab_size=config["vocab_size"],
                d_model=config["dim"],
                layers={"A": LayerConfig(attention, SwiGLUConfig(config["ffn_hidden"]))},
                pattern="A",
                repeat=config["n_layers"],
                norm=PeriNorm(eps=config["norm_eps"]),
                depth=SkipMiddleDepth(key_floor=1e-6) if on_keys else UngatedKeysSkipMiddleDepth(),
            )
        )
    mapped = {rename(name): x for name, x in params.items()}
    assert {name: x.shape for name, x in model.named_parameters()} == {name: x.shape for name, x in mapped.items()}
    decisions, hidden = [], []
    for layer in model.layers.values():
        layer.depth.register_forward_hook(lambda module, args, out: decisions.append(out))  # type: ignore[union-attr]
        layer.register_forward_hook(lambda module, args, out: hidden.append(out[0]["x"]))
    logits = torch.func.functional_call(model, mapped, inputs["input_ids"]).logits
    return {
        "masks": torch.stack([entry for _, writes, *_ in decisions for entry in writes.values()]),
        "gates": torch.stack([gate_BT for gate_BT, *_ in decisions]),
        "hidden_states": torch.stack(hidden),
        "logits": logits,
    }


def rename(name: str) -> str:
    for theirs, ours in NAMES.items():
        name = name.replace(theirs, ours)
    return name
