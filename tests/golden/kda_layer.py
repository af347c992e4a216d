"""The KDA layer."""

from torch import Tensor

from models.mixers.kda import KDAConfig
from tests.golden.layers import convs, run_mixer, weights

NAMES = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "beta": "b_proj", "o": "o_proj", "norm": "o_norm"}
NAMES |= {"decay_down": "f_proj.0", "decay_up": "f_proj.1", "gate_down": "g_proj.0", "gate_up": "g_proj.1"}


def run(inputs: dict[str, Tensor], params: dict[str, Tensor], config: dict) -> dict[str, Tensor]:
    heads, key = config["num_heads"], config["head_dim"]
    value_heads = config.get("num_v_heads", heads)
    ours = KDAConfig(
        num_heads=heads,
        head_dim=key,
        num_value_heads=value_heads,
        expand_v=float(config.get("expand_v", 1)),
        conv_size=config["conv_size"],
        decay_floor=config.get("lower_bound"),
        allow_neg_eigval=config.get("allow_neg_eigval", False),
    )
    mapped = weights(params, NAMES) | convs(params, {"q": heads, "k": heads, "v": value_heads})
    mapped |= {"A_log": params["A_log"], "dt_bias": params["dt_bias"].unflatten(0, (value_heads, key))}
    return {"y": run_mixer(ours, mapped, inputs["x"], config["norm_eps"])}
