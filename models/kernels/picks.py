"""Picks of experts and their weights.

Shape suffixes: `...` or N tokens, E experts, K picks of a token, P picks that are made, S slots of a token.
"""

from typing import NamedTuple, Self

import torch
from torch import Tensor


class Picks(NamedTuple):
    """The token and the pick of each pick that is made, in order. slot: its number among its token's that are. slots:
    S, the most that a token makes."""

    token_P: Tensor
    pick_P: Tensor
    slot_P: Tensor
    slots: int

    @classmethod
    def of(cls, keep_NK: Tensor | None) -> Self | None:
        """Those that are kept; None for all. How many they are is read on the host, since it sets the shape; on the
        meta device, which knows no numbers, they are all."""
        if keep_NK is None or keep_NK.is_meta:
            return None
        token_P, pick_P = keep_NK.nonzero().unbind(1)
        slot_P = (keep_NK.cumsum(1) - 1)[token_P, pick_P]
        return cls(token_P, pick_P, slot_P, int(slot_P.max()) + 1 if len(slot_P) else 1)


def best(ranking_E: Tensor, top_k: int) -> Tensor:
    """The top_k experts, best first, [..., K]."""
    return ranking_E.detach().topk(top_k, dim=-1).indices


def normalized(weights: Tensor) -> Tensor:
    """weights / their sum over the last dimension; 0 where all are 0, which would be 0/0."""
    total = weights.sum(-1, keepdim=True)
    return weights / torch.where(total > 0, total, 1)
