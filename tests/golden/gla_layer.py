"""The GLA layer."""

from torch import Tensor

from models.mixers.gla import GLAConfig
from tests.golden.layers import convs, run_mixer, weights

NAMES = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "gate": "g_proj", "o": "o_proj"}
NAMES |= {"decay_down": "gk_proj.0", "decay_up": "gk_proj.1"}


def run(inputs: dict[str, Tensor], params: dict[str, Tensor], config: dict) -> dict[str, Tensor]:
    heads = config["num_heads"]
    kv_heads = config.get("num_kv_heads", heads)
    ours = GLAConfig(
        num_heads=heads,
        num_kv_heads=kv_heads,
        expand_k=config["expand_k"],
        expand_v=config["expand_v"],
        gate_rank=config["gate_low_rank_dim"],
        gate_normalizer=config["gate_logit_normalizer"],
        gate_floor=config.get("clamp_min"),
        conv_size=config["conv_size"] if config.get("use_short_conv") else None,
        output_gate=config.get("use_output_gate", True),
    )
    norm = "g_norm_swish_gate" if "g_norm_swish_gate.weight" in params else "g_norm"
    mapped = weights(params, {**NAMES, "norm": norm}) | convs(params, {"q": heads, "k": kv_heads, "v": kv_heads})
    return {"y": run_mixer(ours, mapped, inputs["x"], config["norm_eps"])}
