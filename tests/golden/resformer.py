"""ResFormer: whole models with Hugging Face Llama names."""

import torch
from torch import Tensor

from models.config import LayerConfig, LMConfig
from models.ffn.swiglu import SwiGLUConfig
from models.lm import LM
from models.mixers.attention import AttentionConfig
from models.norms.pre import PreNorm
from models.slots import ValuesConfig
from models.values.resformer import LearnableResFormerValues, ResFormerValues

NAMES = {
    "model.embed_tokens.": "embed.",
    "model.norm.": "norm.",
    "lm_head.": "head.",
    "model.layers.": "layers.",
    "input_layernorm.": "mixer.placement.norms.0.",
    "post_attention_layernorm.": "ffn.placement.norms.0.",
    "self_attn.lambda": "mixer.branch.values.lambda",
    "self_attn.": "mixer.branch.mixer.",
    "mlp.": "ffn.branch.ffn.",
    "_proj.": ".",
}


def run(inputs: dict[str, Tensor], params: dict[str, Tensor], config: dict) -> dict[str, Tensor]:
    learnable = config["mixing"] == "learnable"
    values: ValuesConfig = LearnableResFormerValues() if learnable else ResFormerValues(**config["mixing"])
    return run_llama(inputs, params, config, values)


def run_llama(
    inputs: dict[str, Tensor], params: dict[str, Tensor], config: dict, values: ValuesConfig
) -> dict[str, Tensor]:
    with torch.device("meta"):
        model = LM(llama(config, values))
    mapped = {rename(name): x if x.dim() else x[None] for name, x in params.items()}
    assert {name: x.shape for name, x in model.named_parameters()} == {name: x.shape for name, x in mapped.items()}
    return {"logits": torch.func.functional_call(model, mapped, inputs["input_ids"]).logits}


def llama(config: dict, values: ValuesConfig) -> LMConfig:
    attention = AttentionConfig(
        num_heads=config["num_attention_heads"],
        num_kv_heads=config["num_key_value_heads"],
        rope_theta=config["rope_theta"],
    )
    return LMConfig(
        vocab_size=config["vocab_size"],
        d_model=config["hidden_size"],
        layers={"A": LayerConfig(attention, SwiGLUConfig(config["intermediate_size"]))},
        pattern="A",
        repeat=config["num_hidden_layers"],
        values=values,
        norm=PreNorm(eps=config["rms_norm_eps"]),
    )


def rename(name: str) -> str:
    for theirs, ours in NAMES.items():
        name = name.replace(theirs, ours)
    return name
