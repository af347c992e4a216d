"""Linear attention with its normaliser, on features."""

from torch import Tensor

from models.kernels.linear.chunked import chunked
from models.linear import normalized


def run(inputs: dict[str, Tensor], params: dict[str, Tensor], config: dict) -> dict[str, Tensor]:
    q, k, v = inputs["q"] * config["scale"], inputs["k"], inputs["v"]
    if config["normalize"]:
        o, past = normalized(chunked, q, k, v, {}, {}, config["eps"])
        state = past["state"]
        return {"o": o, "final_state": state[..., :-1], "final_z": state[..., -1][:, None]}
    o, state = chunked(q, k, v, scale=1.0)
    return {"o": o, "final_state": state}
