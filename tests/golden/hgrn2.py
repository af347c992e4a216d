"""HGRN2: the operator, in its chunked form, from what the projections give."""

import torch.nn.functional as F
from torch import Tensor

from models.kernels.linear.chunked import chunked
from models.lower_bounds import forgetting


def run(inputs: dict[str, Tensor], params: dict[str, Tensor], config: dict) -> dict[str, Tensor]:
    k, g = forgetting(inputs["f"], inputs.get("lower_bound"))
    q, v = F.silu(inputs["q"]), inputs["i"]
    o, final_state = chunked(q, k, v, g, scale=config["scale"], state_BJKV=inputs.get("initial_state"))
    return {"o": o, "final_state": final_state}
