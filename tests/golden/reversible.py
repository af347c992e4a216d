"""Reversible blocks: x1 <- x1 + F(x2), x2 <- x2 + G(x1), on the halves of the features."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.residual.reversible import ReversibleResidual
from tests.connections import Params, apply, causal_mean, context


def run(inputs: Params, params: Params, config: dict) -> Params:
    x1, x2 = inputs["x"].chunk(2, dim=-1)
    state = {"x1": x1, "x2": x2}
    kind, width = ReversibleResidual(), x1.shape[-1]
    for index in range(config["blocks"]):
        own = {k.removeprefix(f"blocks.{index}."): p for k, p in params.items() if k.startswith(f"blocks.{index}.")}

        def mix(u: Tensor, own: Params = own) -> Tensor:
            normed = F.layer_norm(u, (width,), own["f.norm.weight"], own["f.norm.bias"], 1e-5)
            return torch.tanh(F.linear(causal_mean(normed), own["f.w.weight"], own["f.w.bias"]))

        def feed(u: Tensor, own: Params = own) -> Tensor:
            normed = F.layer_norm(u, (width,), own["g.norm.weight"], own["g.norm.bias"], 1e-5)
            hidden = F.gelu(F.linear(normed, own["g.w1.weight"], own["g.w1.bias"]))
            return F.linear(hidden, own["g.w2.weight"], own["g.w2.bias"])

        place = context(width, index, config["blocks"])
        state = apply(kind.connect(place, "mixer", nn.Identity()), {}, state, mix)
        state = apply(kind.connect(place, "ffn", nn.Identity()), {}, state, feed)
    return {"y": torch.cat([state["x1"], state["x2"]], dim=-1)}
