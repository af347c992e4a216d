"""The delta rule: the operator, in its chunked form."""

from torch import Tensor

from models.kernels.linear.chunked import chunked


def run(inputs: dict[str, Tensor], params: dict[str, Tensor], config: dict) -> dict[str, Tensor]:
    q, k, v, beta = (inputs[name] for name in ("q", "k", "v", "beta"))
    o, final_state = chunked(q, k, v, None, beta, scale=config["scale"], state_BJKV=inputs.get("initial_state"))
    return {"o": o, "final_state": final_state}
