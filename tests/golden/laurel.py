"""LAuReL's forms, by their formula: connections of the plain residual around tanh branches."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.residual.plain import PlainResidual
from models.shortcuts.laurel_pa import LaurelLowRankPrevious
from models.shortcuts.laurel_rw import LaurelWeightsLowRank
from models.slots import Beside, Connection
from models.state import State
from tests.connections import Params, call, context

NAMES = {
    "connection.shortcut.down.weight": "A",
    "connection.shortcut.up.weight": "B",
    "connection.shortcut.path.down.weight": "A",
    "connection.shortcut.path.up.weight": "B",
    "connection.shortcut.weights.logits": "rw",
    "beside.gamma": "gamma",
}


class Sublayer(nn.Module):
    def __init__(self, connection: Connection, beside: Beside) -> None:
        super().__init__()
        self.connection, self.beside = connection, beside

    def forward(self, state: State, branch: Tensor) -> State:
        x_BTD = state["x"]
        out_BTD = torch.tanh(F.rms_norm(x_BTD, x_BTD.shape[-1:], eps=1e-6) @ branch.T)
        inputs = {name: state[name] for name in self.beside.reads}
        out_BTD, entries = self.beside(x_BTD, x_BTD, out_BTD, inputs)
        return {**self.connection.write(state, {}, out_BTD), **entries}


def run(inputs: Params, params: Params, config: dict) -> Params:
    width, rank, state = config["D"], config["rank"], {"x": inputs["x"]}
    kind = (
        LaurelWeightsLowRank(total=1, rank=rank)
        if config["parts"] == ["rw", "lr"]
        else LaurelLowRankPrevious(rank=rank)
    )
    for index in range(config["layers"]):
        place, branch = context(width, index // 2, config["layers"]), "ffn" if index % 2 else "mixer"
        path = kind.build(place)
        layer = Sublayer(PlainResidual().connect(place, branch, path), kind.beside(place, branch, path))
        needed = {name: params[f"layers.{index}.{NAMES[name]}"] for name, _ in layer.named_parameters()}
        state = call(layer, needed, state, params[f"layers.{index}.branch.weight"])
    return {"y": state["x"]}
