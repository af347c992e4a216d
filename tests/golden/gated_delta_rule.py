"""Gated delta rule: the operator, in its chunked form."""

from torch import Tensor

from models.kernels.linear.chunked import chunked


def run(inputs: dict[str, Tensor], params: dict[str, Tensor], config: dict) -> dict[str, Tensor]:
    operands = [inputs[name] for name in ("q", "k", "v", "g", "beta")]
    o, final_state = chunked(*operands, scale=config["scale"], state_BJKV=inputs.get("initial_state"))
    return {"o": o, "final_state": final_state}
