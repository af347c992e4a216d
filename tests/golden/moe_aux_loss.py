"""Balance loss and z-loss of the MoE layer. Its router is the identity, so that its input is the case's logits."""

import torch
from torch import Tensor
from torch.func import functional_call

from models.config import LayerConfig, LMConfig
from models.ffn.moe import MoE, MoEConfig
from models.mixers.attention import AttentionConfig
from models.routers.deepseek_v2 import DeepSeekV2Config
from models.state import Side


def run(inputs: dict[str, Tensor], params: dict[str, Tensor], config: dict) -> dict[str, Tensor]:
    experts = config["num_experts"]
    logits = torch.stack([inputs[f"router_logits{layer}"] for layer in range(config["layers"])])
    x_BTD = logits.unflatten(1, (config["B"], config["S"])).flatten(0, 1)  # layers are pooled: more rows of one batch
    padding = torch.zeros(x_BTD.shape[:2], dtype=torch.int64)
    if "attention_mask" in inputs:
        padding = inputs["attention_mask"].repeat(config["layers"], 1) - 1
    rows = int((padding == 0).sum())

    def losses(documents: Tensor | None) -> dict[str, Tensor]:
        router = DeepSeekV2Config(top_k=config["top_k"], aux_coef=1.0, z_coef=1.0, stats_group="microbatch")
        moe = MoEConfig(experts, 1, router)
        model = LMConfig(2, experts, {"M": LayerConfig(AttentionConfig(1, rope="none"), moe)}, "M")
        module = moe.build(model.context(0)).double()
        assert isinstance(module, MoE)
        tokens = torch.zeros(x_BTD.shape[:2], dtype=torch.int64)
        identity = {"router.weight": torch.eye(experts, dtype=torch.float64)}
        return functional_call(module, identity, (x_BTD, {}, Side(tokens, tokens, documents))).losses

    return {
        # DeepSeek's loss is the mean over the picks of a token; Switch's, as Mixtral's, is their sum.
        "aux_loss": losses(padding)["load_balance"] * config["top_k"] / rows,
        "z_loss": losses(None)["router_z"] / padding.numel(),
    }
