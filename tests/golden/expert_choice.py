"""Expert choice: our router, with the case's own experts behind it (two matrices and an exact GELU)."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from models.routers.expert_choice import ExpertChoiceConfig
from models.state import Side


def run(inputs: dict[str, Tensor], params: dict[str, Tensor], config: dict) -> dict[str, Tensor]:
    x_BTD, ids = inputs["x"][None], torch.zeros(1, config["T"], dtype=torch.int64)
    router = ExpertChoiceConfig(capacity_factor=config["capacity_factor"]).build(config["D"], config["E"]).double()
    weight = {"weight": params["router.weight"]}
    routing = functional_call(router, weight, (x_BTD, Side(ids, ids)), strict=True).routing
    gates_TE = (routing.weights_BTK * routing.keep_BTK)[0]
    hidden_ETH = F.gelu(torch.einsum("td,edh->eth", x_BTD[0], params["experts.w1"]))
    y_ETD = torch.einsum("eth,ehd->etd", hidden_ETH, params["experts.w2"])
    # The case lists each expert's tokens best first.
    gates_EC, index_EC = gates_TE.T.topk(config["k"], dim=-1)
    assert (gates_TE > 0).sum() == config["E"] * config["k"]
    return {
        "scores": routing.probs_BTE[0],
        "gates": gates_EC,
        "token_index": index_EC,
        "y": torch.einsum("te,etd->td", gates_TE, y_ETD),
    }
