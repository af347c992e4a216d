"""Head and cross-entropy. Losses are sums over tokens; the caller divides by one global token count.

Shape suffixes: B batch, T sequence, D model width, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.params import Axis, Normal, declare, upcast

IGNORE = -100


def cross_entropy(h_BTD: Tensor, weight_VD: Tensor, targets_BT: Tensor) -> Tensor:
    """Sum over the valid targets (those other than -100) of -log softmax(h W^T)[target], at least in float32."""
    logits = upcast(F.linear(h_BTD, weight_VD))
    return F.cross_entropy(logits.flatten(0, -2), targets_BT.flatten(), ignore_index=IGNORE, reduction="sum")


def lookup(weight_VD: Tensor, tokens_BT: Tensor) -> Tensor:
    return F.embedding(tokens_BT, weight_VD)


class Embedding(nn.Module):
    """Token ids to vectors. `lookup` is replaced where the vocabulary is split over ranks."""

    weight: nn.Parameter

    def __init__(self, vocab_size: int, d_model: int) -> None:
        super().__init__()
        declare(self, "weight", (vocab_size, d_model), Normal(0.02), (Axis("vocab", vocab_size), None))
        self.lookup = lookup

    def forward(self, tokens_BT: Tensor) -> Tensor:
        return self.lookup(self.weight, tokens_BT)


class Head(nn.Module):
    """Vectors to logits or to the loss. A tied head owns no parameter and is handed the embedding's."""

    weight: nn.Parameter

    def __init__(self, vocab_size: int, d_model: int, tied: bool) -> None:
        super().__init__()
        self.tied = tied
        if not tied:
            self.own_weight(vocab_size, d_model)
        self.cross_entropy = cross_entropy

    def own_weight(self, vocab_size: int, d_model: int) -> None:
        """Give the head a weight of its own: always when untied, a copy when its embedding is on another stage."""
        self.tied = False
        declare(self, "weight", (vocab_size, d_model), Normal(0.02), (Axis("vocab", vocab_size), None))

    def forward(self, h_BTD: Tensor, weight_VD: Tensor, targets_BT: Tensor | None) -> Tensor:
        """Logits [B, T, V], or with targets the loss sum (shape [])."""
        if targets_BT is None:
            return F.linear(h_BTD, weight_VD)
        return self.cross_entropy(h_BTD, weight_VD, targets_BT)


def count_targets(targets_BT: Tensor) -> Tensor:
    return (targets_BT != IGNORE).sum(dtype=torch.int64)
