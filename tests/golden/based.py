"""Based: the expanded features through linear attention, with and without its normaliser."""

from torch import Tensor

from models.kernels.linear.chunked import chunked
from models.linear import normalized
from models.mixers.based import taylor


def run(inputs: dict[str, Tensor], params: dict[str, Tensor], config: dict) -> dict[str, Tensor]:
    q, k, v = taylor(inputs["q"], config["scale"]), taylor(inputs["k"], config["scale"]), inputs["v"]
    if config["use_norm"]:
        return {"o": normalized(chunked, q, k, v, {}, {}, config["eps"])[0]}
    return {"o": chunked(q, k, v, scale=1.0)[0]}
