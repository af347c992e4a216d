"""Gated slot attention: the operator, in its chunked form."""

from torch import Tensor

from models.kernels.linear.chunked import chunked
from models.mixers.gsa import attend_slots

STATES = {"keys": "state_k", "values": "state_v"}


def run(inputs: dict[str, Tensor], params: dict[str, Tensor], config: dict) -> dict[str, Tensor]:
    past = {ours: inputs[f"initial_{theirs}"] for ours, theirs in STATES.items() if f"initial_{theirs}" in inputs}
    q, k, v, s, g = (inputs[name] for name in ("q", "k", "v", "s", "g"))
    o, states = attend_slots(chunked, q, k, v, s, g, past, scale=config["scale"])
    return {"o": o} | {f"final_{theirs}": states[ours] for ours, theirs in STATES.items()}
