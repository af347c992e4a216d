"""The Gated DeltaNet layer, with fla's separate projections and with Qwen3-Next's fused ones."""

from torch import Tensor

from models.mixers.gated_deltanet import GatedDeltaNetConfig
from tests.golden.layers import convs, run_mixer, weights

FLA = {
    "q": "q_proj",
    "k": "k_proj",
    "v": "v_proj",
    "beta": "b_proj",
    "decay": "a_proj",
    "gate": "g_proj",
    "o": "o_proj",
    "norm": "o_norm",
}


def run(inputs: dict[str, Tensor], params: dict[str, Tensor], config: dict) -> dict[str, Tensor]:
    ours, mapped = qwen3next(params, config) if config["variant"] == "qwen3next" else fla(params, config)
    return {"y": run_mixer(ours, mapped, inputs["x"], config["norm_eps"])}


def fla(params: dict[str, Tensor], config: dict) -> tuple[GatedDeltaNetConfig, dict[str, Tensor]]:
    ours = GatedDeltaNetConfig(
        num_heads=config["num_heads"],
        head_dim=config["head_dim"],
        num_value_heads=config.get("num_v_heads"),
        expand_v=float(config.get("expand_v", 2)),
        conv_size=config.get("conv_size", 4),
        conv_bias=config.get("conv_bias", False),
        output_gate=config.get("use_gate", True),
        allow_neg_eigval=config.get("allow_neg_eigval", False),
    )
    value_heads = ours.num_value_heads or ours.num_heads
    mapped = weights(params, FLA) | convs(params, {"q": ours.num_heads, "k": ours.num_heads, "v": value_heads})
    return ours, mapped | {"A_log": params["A_log"], "dt_bias": params["dt_bias"]}


def qwen3next(params: dict[str, Tensor], config: dict) -> tuple[GatedDeltaNetConfig, dict[str, Tensor]]:
    """Their fused rows come per key head: [q | k | r values | r gates] and [r betas | r decays]."""
    heads, value_heads = config["num_k_heads"], config["num_v_heads"]
    key, value = config["head_k_dim"], config["head_v_dim"]
    ours = GatedDeltaNetConfig(
        num_heads=heads,
        head_dim=key,
        num_value_heads=value_heads,
        expand_v=value / key,
        conv_size=config["conv_kernel"],
    )
    wide = value * value_heads // heads
    qkvz = params["in_proj_qkvz.weight"].unflatten(0, (heads, -1)).split([key, key, wide, wide], 1)
    ba = params["in_proj_ba.weight"].unflatten(0, (heads, -1)).chunk(2, 1)
    convs = params["conv1d.weight"].squeeze(1).split([heads * key, heads * key, value_heads * value])
    mapped = {f"{name}.weight": x.flatten(0, 1) for name, x in zip(("q", "k", "v", "gate"), qkvz, strict=True)}
    mapped |= {f"{name}.weight": x.flatten(0, 1) for name, x in zip(("beta", "decay"), ba, strict=True)}
    for name, count, x in zip(("q", "k", "v"), (heads, heads, value_heads), convs, strict=True):
        mapped[f"conv_{name}"] = x.unflatten(0, (count, -1))
    mapped |= {"A_log": params["A_log"], "dt_bias": params["dt_bias"]}
    return ours, mapped | {"norm.weight": params["norm.weight"], "o.weight": params["out_proj.weight"]}
