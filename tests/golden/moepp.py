"""Two released MoE++ layers with the gating residual between them: y1 = layer0(x), y2 = layer1(x + y1)."""

import torch
from torch import Tensor
from torch.func import functional_call

from models.config import LayerConfig, LMConfig
from models.ffn.moe_plus_plus import LOGITS, MoEPlusPlus
from models.ffn.moe_plus_plus_released import MoEPlusPlusReleasedConfig
from models.mixers.attention import AttentionConfig
from models.state import Side, State


def ffn_config(config: dict) -> MoEPlusPlusReleasedConfig:
    selected = config.get("moe_use_mixtral_gating", False)
    return MoEPlusPlusReleasedConfig(
        num_experts=config["n_ffn"],
        hidden=config["intermediate_size"],
        num_constant=config["n_constant"],
        num_copy=config["n_copy"],
        num_zero=config["n_zero"],
        top_k=config["top_k"],
        router="two_layer" if config.get("moe_2layer_gate", True) else "linear",
        gating="selected" if selected else "masked",
        input_scale=1.0 if selected or config.get("moe_feature_no_mul_topk", False) else 2.0,
        logits_std=config.get("moe_gate_norm_std", 1.0) if config.get("moe_use_logits_norm", False) else None,
    )


def layer_params(params: dict[str, Tensor], layer: int, config: dict) -> dict[str, Tensor]:
    own = {
        key.removeprefix(f"layer{layer}."): value for key, value in params.items() if key.startswith(f"layer{layer}.")
    }
    ffn, constants = config["n_ffn"], range(config["n_ffn"], config["n_ffn"] + config["n_constant"])
    up = torch.stack([own[f"experts.{e}.up_proj.weight"].T for e in range(ffn)])
    gate, up = up.chunk(2, dim=-1)
    out = {
        "experts.gate": gate,
        "experts.up": up,
        "experts.down": torch.stack([own[f"experts.{e}.down_proj.weight"].T for e in range(ffn)]),
    }
    if constants:
        out["constants.weight"] = torch.stack([own[f"experts.{e}.wg.weight"] for e in constants])
        out["constants.value"] = torch.stack([own[f"experts.{e}.constant"] for e in constants])
    if "gate.wg.weight" in own:
        out["router.weight"] = own["gate.wg.weight"]
    else:
        out["router.inner.weight"], out["router.outer.weight"] = own["gate.wg.0.weight"], own["gate.wg.2.weight"]
    if layer > 0:
        out["router_residual.weight"] = own["gate.gate_map.weight"]
    return out


def run(inputs: dict[str, Tensor], params: dict[str, Tensor], config: dict) -> dict[str, Tensor]:
    ffn = ffn_config(config)
    layers = {"M": LayerConfig(AttentionConfig(1, rope="none"), ffn)}
    model = LMConfig(2, config["hidden_size"], layers, "MMM")  # a third layer reads the logits of the second
    ids = torch.zeros(config["B"], config["S"], dtype=torch.int64)
    outs: dict[str, Tensor] = {}
    x_BTD, state = inputs["x"], State()
    for layer in range(2):
        module = ffn.build(model.context(layer)).double()
        assert isinstance(module, MoEPlusPlus)
        result = functional_call(
            module, layer_params(params, layer, config), (x_BTD, state, Side(ids, ids)), strict=True
        )
        state = result.writes
        routing = module.select(state[LOGITS].flatten(0, 1), Side(ids, ids))
        outs[f"y{layer + 1}"] = result.out_BTD
        outs[f"router_logits{layer + 1}"] = state[LOGITS].flatten(0, 1)
        outs[f"topk_index{layer + 1}"] = routing.index_BTK
        gates = torch.zeros_like(routing.logits_BTE)
        outs[f"dense_gates{layer + 1}"] = gates.scatter(1, routing.index_BTK, routing.weights_BTK)
        x_BTD = inputs["x"] + result.out_BTD
    return outs
