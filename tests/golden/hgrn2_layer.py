"""The HGRN2 layer. Its lower bound, which other layers have a part in, is an input."""

from torch import Tensor

from models.mixers.hgrn2 import HGRN2Config
from tests.golden.layers import convs, run_mixer, weights

NAMES = {"q": "q_proj", "forget": "f_proj", "v": "i_proj", "o.output": "o_proj"}


def run(inputs: dict[str, Tensor], params: dict[str, Tensor], config: dict) -> dict[str, Tensor]:
    heads, key = config["num_heads"], config["expand_ratio"]
    ours = HGRN2Config(
        expand_ratio=key,
        num_heads=heads,
        conv_size=config["conv_size"] if config.get("use_short_conv") else None,
        lower_bounds=False,
    )
    mapped = weights(params, NAMES) | {"o.weight": params["g_norm.weight"].unflatten(0, (heads, -1))}
    for name, theirs in (("q", "q"), ("forget", "f"), ("v", "i")):
        found = convs(params, {theirs: heads})
        mapped |= {f"conv_{name}": x for x in found.values()}
    bounds = {name: x.unflatten(0, (heads, key)) for name, x in inputs.items() if name == "lower_bound"}
    extra = {"bounds": bounds["lower_bound"]} if bounds else {}
    return {"y": run_mixer(ours, mapped, inputs["x"], config["norm_eps"], extra)}
