"""MoE++'s balance loss and capacity. Its router is the identity, so that the layer's input is the case's logits."""

import torch
from torch import Tensor
from torch.func import functional_call

from models.config import LayerConfig, LMConfig
from models.ffn.balance import LocalReduce, count_picks, group_loads
from models.ffn.moe_plus_plus import MoEPlusPlus, MoEPlusPlusConfig, capacity, kept_picks
from models.mixers.attention import AttentionConfig
from models.state import Side


def run(inputs: dict[str, Tensor], params: dict[str, Tensor], config: dict) -> dict[str, Tensor]:
    x_BTD = inputs["logits"][None]
    ffn, free, tokens = config["n_ffn"], config["n_zero_computation"], config["T"]
    kinds = {"num_constant": free, "num_copy": 0, "num_zero": 0}
    moepp = MoEPlusPlusConfig(ffn, 1, top_k=config["top_k"], tau=config["tau"], aux_coef=1.0, **kinds)
    model = LMConfig(2, ffn + free, {"M": LayerConfig(AttentionConfig(1, rope="none"), moepp)}, "M")
    module = moepp.build(model.context(0)).double()
    assert isinstance(module, MoEPlusPlus)
    ids = torch.zeros(1, tokens, dtype=torch.int64)
    side = Side(ids, ids)
    identity = {"router.weight": torch.eye(ffn + free, dtype=torch.float64)}
    loss = functional_call(module, identity, (x_BTD, {}, side)).losses["load_balance"]
    routing = module.select(x_BTD)
    picks = count_picks(routing.index_BTK, side.valid_BT, ffn + free)
    of_ffn, of_free = capacity(moepp, tokens, config["gamma"])
    capacities = torch.tensor([of_ffn] * ffn + [of_free] * free, dtype=torch.float64)
    return {
        "P": routing.probs_BTE.mean((0, 1)),
        "capacity": capacities,
        "eta": torch.tensor([1.0] * ffn + [moepp.tau] * free, dtype=torch.float64),
        "f": group_loads(picks, side.valid_BT, "sequence", LocalReduce(), torch.float64)[0],
        "kept_mask_floor": kept_picks(routing.index_BTK[0], capacities).double(),
        "loss": loss / tokens,
        "topk_index": routing.index_BTK[0],
    }
