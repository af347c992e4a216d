"""MoE++'s balance loss, on the case's own picks. Its router is the identity, so that the layer's input is the case's
logits. The cases also hold the paper's capacity, which a dropless layer has no use for: its formula stands here."""

import torch
from torch import Tensor
from torch.func import functional_call

from models.config import LayerConfig, LMConfig
from models.ffn.balance import LocalReduce, count_picks, group_loads
from models.ffn.moe_plus_plus import MoEPlusPlus, MoEPlusPlusConfig
from models.mixers.attention import AttentionConfig
from models.state import Side


def capacity(config: MoEPlusPlusConfig, tokens: int, gamma: float) -> tuple[float, float]:
    """Of (an FFN expert, any other expert), not rounded: gamma tau T / (tau N_F + N_Z), and the same without tau."""
    share = config.tau * config.num_experts + config.num_total - config.num_experts
    return gamma * config.tau * tokens / share, gamma * tokens / share


def kept_picks(index_TK: Tensor, capacities_E: Tensor) -> Tensor:
    """Which picks stay when each expert takes its first floor(capacity) ones in token order: bool [T, E]."""
    picked_TE = torch.zeros(index_TK.shape[0], capacities_E.shape[0], dtype=torch.int64)
    picked_TE = picked_TE.scatter(1, index_TK, 1)
    return (picked_TE > 0) & (picked_TE.cumsum(0) <= capacities_E.floor())


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
