"""Picks of experts and their weights.

Shape suffixes: `...` tokens, E experts.
"""

import torch
from torch import Tensor


def best(ranking_E: Tensor, top_k: int) -> Tensor:
    """The top_k experts, best first, [..., K]."""
    return ranking_E.detach().topk(top_k, dim=-1).indices


def normalized(weights: Tensor) -> Tensor:
    """weights / their sum over the last dimension; 0 where all are 0, which would be 0/0."""
    total = weights.sum(-1, keepdim=True)
    return weights / torch.where(total > 0, total, 1)
