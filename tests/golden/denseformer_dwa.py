"""DenseFormer: blocks x + tanh(x W^T) with depth-weighted averages, of all outputs or of some."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.residual.denseformer import DenseFormer
from tests.connections import Params, apply, call, context


def run(inputs: Params, params: Params, config: dict) -> Params:
    """Our layer has two sublayers; the block is its mixer's, and its FFN adds nothing."""
    depth, width = config["n_blocks"], config["D"]
    kind = DenseFormer(config["dilation"], config["period"])
    state, seen = kind.open(width)(inputs["x"]), []
    for index in range(depth + 1):
        key = f"alphas.{index - 1}.weight"
        own = {"average.weight": params[key][0]} if key in params else {}
        if index == depth:
            seen.append(call(kind.close(width, depth), own, state))
            break

        def block(y: Tensor, index: int = index) -> Tensor:
            seen.append(y)
            return torch.tanh(F.linear(y, params[f"blocks.{index}.weight"]))

        place = context(width, index, depth)
        state = apply(kind.connect(place, "mixer", nn.Identity()), own, state, block)
        state = apply(kind.connect(place, "ffn", nn.Identity()), {}, state, torch.zeros_like)
    return {"all": torch.stack(seen[1:]), "y": seen[-1]}
