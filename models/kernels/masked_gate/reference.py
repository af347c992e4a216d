"""MoE++'s gate in plain torch.

Shape suffixes: `...` tokens, E experts, K picks.
"""

from torch import Tensor

from models.kernels.picks import best, normalized


def masked_gate(
    logits_E: Tensor, earlier_E: Tensor | None, top_k: int, first_zero: int, picked_K: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logits + earlier, their softmax p, the top_k of p, and p of these divided by its sum, where experts from
    first_zero on count 0). earlier: the gating residual. picked: in the place of the top_k."""
    if earlier_E is not None:
        logits_E = logits_E + earlier_E
    probs_E = logits_E.softmax(-1)
    index_K = best(probs_E, top_k) if picked_K is None else picked_K
    weights_K = probs_E.gather(-1, index_K).masked_fill(index_K >= first_zero, 0)
    return logits_E, probs_E, index_K, normalized(weights_K)
