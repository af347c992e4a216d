"""Fast feed-forward: all leaves in training, one otherwise."""

import torch
from torch import Tensor, nn

from models.ffn.fff import FFF, FFFConfig, entropy
from models.params import Normal

NAMES = {"nodes": "node_weights", "up": "w1s", "up_bias": "b1s", "down": "w2s", "down_bias": "b2s"}


class Trained(nn.Module):
    def __init__(self, ffn: FFF, hard: bool) -> None:
        super().__init__()
        self.ffn, self.hard = ffn, hard

    def forward(self, x_BTD: Tensor) -> dict[str, Tensor]:
        decisions_BTI = nn.functional.linear(x_BTD, self.ffn.nodes, self.ffn.node_bias).sigmoid()
        doubt_I = entropy(decisions_BTI).mean((0, 1))
        # Rounded ones hand no gradient to the nodes, whose own comes from entropies alone.
        shares_BTL = self.ffn.shares(decisions_BTI.round() if self.hard else decisions_BTI)
        return {"y": self.ffn.all_leaves(x_BTD, shares_BTL), "mean_node_entropy": doubt_I}


class Used(Trained):
    def forward(self, x_BTD: Tensor) -> dict[str, Tensor]:
        x_ND = x_BTD.flatten(0, -2)
        logits_NI = nn.functional.linear(x_ND, self.ffn.nodes, self.ffn.node_bias)
        return {"y": self.ffn.one_leaf(x_ND, self.ffn.leaf(logits_NI)).unflatten(0, x_BTD.shape[:-1])}


def run(inputs: dict[str, Tensor], params: dict[str, Tensor], config: dict) -> dict[str, Tensor]:
    ffn = FFF(
        FFFConfig(config["depth"], config["leaf_width"], config["activation"]), config["input_width"], Normal(0.02)
    )
    weights = {ours: params[theirs] for ours, theirs in NAMES.items()}
    weights["node_bias"] = params["node_biases"].flatten()
    trains = config["mode"] == "train"
    if not trains:
        # The reference leaves the bias of a leaf's output out when it follows decisions.
        weights["down_bias"] = torch.zeros_like(weights["down_bias"])
    module = (Trained if trains else Used)(ffn, config["hard"])
    named = {f"ffn.{name}": weight for name, weight in weights.items()}
    return torch.func.functional_call(module, named, (inputs["x"],), strict=True)
