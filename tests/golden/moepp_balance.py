"""MoE++'s balance loss, on the case's own picks. Its router is the identity, so that the layer's input is the case's
logits. The cases count the paper's capacity over tokens, and the layer over picks, of which a token has top_k."""

import torch
from torch import Tensor
from torch.func import functional_call

from models.config import LayerConfig, LMConfig
from models.ffn.moe_plus_plus import MoEPlusPlus, MoEPlusPlusConfig
from models.mixers.attention import AttentionConfig
from models.state import Side


def run(inputs: dict[str, Tensor], params: dict[str, Tensor], config: dict) -> dict[str, Tensor]:
    x_BTD = inputs["logits"][None]
    ffn, free, tokens = config["n_ffn"], config["n_zero_computation"], config["T"]
    kinds = {"num_constant": free, "num_copy": 0, "num_zero": 0}
    top_k, tau = config["top_k"], config["tau"]
    moepp = MoEPlusPlusConfig(
        ffn, 1, top_k=top_k, tau=tau, aux_coef=1.0, capacity_factor=config["gamma"] / top_k, **kinds
    )
    model = LMConfig(2, ffn + free, {"M": LayerConfig(AttentionConfig(1, rope="none"), moepp)}, "M")
    module = moepp.build(model.context(0)).double()
    assert isinstance(module, MoEPlusPlus)
    ids = torch.zeros(1, tokens, dtype=torch.int64)
    side = Side(ids, ids)
    identity = {"router.weight": torch.eye(ffn + free, dtype=torch.float64)}
    loss = functional_call(module, identity, (x_BTD, {}, side)).losses["load_balance"]
    routing = module.select(x_BTD, side)
    assert module.room is not None
    kept = torch.zeros(tokens, ffn + free, dtype=torch.float64)
    kept.scatter_(1, routing.index_BTK[0], module.room(routing, side)[0].double())
    numerators = torch.tensor(module.room.numerators, dtype=torch.float64)
    return {
        "P": routing.probs_BTE.mean((0, 1)),
        "capacity": numerators * tokens / module.room.denominator,
        "eta": torch.tensor([1.0] * ffn + [tau] * free, dtype=torch.float64),
        "f": module.balance.shares(routing.index_BTK, side.valid_BT, ffn + free)[0],
        "kept_mask_floor": kept,
        "loss": loss / tokens,
        "topk_index": routing.index_BTK[0],
    }
