"""RG-LRU: gates and recurrence, with documents that start where positions are 0."""

from torch import Tensor

from models.kernels.diagonal import scan
from models.mixers.rg_lru import gates

NAMES = {"input_gate": "input_gate_weight", "input_bias": "input_gate_bias"}
NAMES |= {"recurrent_gate": "recurrent_gate_weight", "recurrent_bias": "recurrent_gate_bias"}


def run(inputs: dict[str, Tensor], params: dict[str, Tensor], config: dict) -> dict[str, Tensor]:
    starts_BT = inputs["position_ids"] == 0
    weights = {ours: params[theirs] for ours, theirs in NAMES.items()}
    weights["decay"] = params["recurrent_param"].unflatten(0, (config["heads"], -1))
    decay, x = gates(inputs["x"].unflatten(-1, (config["heads"], -1)), weights, starts_BT)
    return {"y": scan(decay, x, starts_BT.cumsum(1))[0].flatten(-2)}
