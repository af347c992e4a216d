"""Retention: the operator, in its chunked form."""

from torch import Tensor

from models.kernels.linear.chunked import chunked
from models.mixers.retention import log_decays


def run(inputs: dict[str, Tensor], params: dict[str, Tensor], config: dict) -> dict[str, Tensor]:
    q, k, v = (inputs[name] for name in ("q", "k", "v"))
    g = log_decays(q.shape[2], q.device, q.dtype).expand(q.shape[:3])
    o, final_state = chunked(q, k, v, g, scale=config["scale"], state_BJKV=inputs.get("initial_state"))
    return {"o": o, "final_state": final_state}
