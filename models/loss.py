"""The vocabulary's matrix, as embedding and as head, and the cross-entropy.

Losses are sums over tokens; the caller divides by one global token count.
Shape suffixes: B batch, T sequence, D model width, V vocabulary.
"""

from collections.abc import Callable
from types import MappingProxyType
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.kernels.in_float32 import Widening
from models.kernels.linear_cross_entropy import IGNORE, linear_cross_entropy
from models.kernels.op import FLOAT32
from models.params import Axis, Normal, Role, declare

__all__ = ["IGNORE", "Vocabulary", "count_targets"]


def cross_entropy(h_BTD: Tensor, weight_VD: Tensor, targets_BT: Tensor) -> Tensor:
    """Sum over the valid targets (those other than -100) of -log softmax(h W^T)[target], at least in float32."""
    return linear_cross_entropy(h_BTD.flatten(0, 1), weight_VD, targets_BT.flatten())


def lookup(weight_VD: Tensor, tokens_BT: Tensor) -> Tensor:
    return F.embedding(tokens_BT, weight_VD)


def operands(h_BTD: Tensor, weight_VD: Tensor) -> tuple[Tensor, Tensor]:
    return h_BTD, weight_VD


class Operands(Widening):
    """What the cross-entropy multiplies, in the type of its products."""

    name = "head"
    reference: ClassVar[Callable[..., Any]] = staticmethod(operands)
    others = MappingProxyType({FLOAT32: "models.kernels.in_float32:operands_in_float32"})


class Vocabulary(nn.Module):
    """A matrix [V, D] with a row per token id: an embedding (the forward pass), a head, or both when they are tied.

    `lookup` and `cross_entropy` are replaced where the vocabulary is split over ranks.
    """

    weight: nn.Parameter

    def __init__(self, vocab_size: int, d_model: int, role: Role) -> None:
        super().__init__()
        declare(self, "weight", (vocab_size, d_model), Normal(0.02), (Axis("vocab", vocab_size), None), role=role)
        self.operands = Operands()
        self.lookup = lookup
        self.cross_entropy = cross_entropy

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """The tokens' vectors [B, T, D]."""
        return self.lookup(self.weight, tokens_BT)

    def logits(self, h_BTD: Tensor) -> Tensor:
        return F.linear(h_BTD, self.weight)

    def loss(self, h_BTD: Tensor, targets_BT: Tensor) -> Tensor:
        """The sum (shape []) of the targets' cross-entropies."""
        h_BTD, weight_VD = self.operands(h_BTD, self.weight)
        return self.cross_entropy(h_BTD, weight_VD, targets_BT)


def count_targets(targets_BT: Tensor) -> Tensor:
    return (targets_BT != IGNORE).sum(dtype=torch.int64)
