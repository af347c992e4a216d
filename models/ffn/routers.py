"""Routers: from a token to the experts that it takes and their weights, at least in float32.

A router maps tokens to logits; a selection maps logits to picks. Shape suffixes: B batch, T sequence, D model width,
E experts, K picks.
"""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from models.params import Linear, upcast


class Routing(NamedTuple):
    """logits_BTE: as the router gave them. probs_BTE: sums to 1 over experts; what balance losses average.
    index_BTK: the experts picked, best first. weights_BTK: what their outputs are multiplied by."""

    logits_BTE: Tensor
    probs_BTE: Tensor
    index_BTK: Tensor
    weights_BTK: Tensor


class LinearRouter(Linear):
    """`logits = W x`, at least in float32 whatever the model's type: near ties decide picks."""

    def __init__(self, d_in: int, num_experts: int) -> None:
        super().__init__(d_in, num_experts, role="router")

    def forward(self, x_ND: Tensor) -> Tensor:
        return F.linear(upcast(x_ND), upcast(self.weight))


@dataclasses.dataclass(frozen=True)
class TopK:
    """The top_k experts by score + bias. Weights: their scores, divided by their sum if `normalize`, times `scale`.

    The bias (DeepSeek-V3's balancing, arXiv 2408.15664) decides picks and never weights.
    """

    top_k: int
    normalize: bool
    scale: float

    def __call__(self, logits_BTE: Tensor, bias_E: Tensor | None = None) -> Routing:
        raise NotImplementedError

    def pick(self, scores_BTE: Tensor, bias_E: Tensor | None) -> tuple[Tensor, Tensor]:
        """(index_BTK, weights_BTK)."""
        ranking_BTE = scores_BTE.detach() if bias_E is None else scores_BTE.detach() + bias_E
        index_BTK = ranking_BTE.topk(self.top_k, dim=-1).indices
        weights_BTK = scores_BTE.gather(-1, index_BTK)
        return index_BTK, (normalized(weights_BTK) if self.normalize else weights_BTK) * self.scale


class SoftmaxTopK(TopK):
    """Scores softmax(logits). `normalize` is Mixtral's form (arXiv 2401.04088); without it, it is Switch's (2101.03961)
    and DeepSeek-V2's (2405.04434)."""

    def __call__(self, logits_BTE: Tensor, bias_E: Tensor | None = None) -> Routing:
        probs_BTE = logits_BTE.softmax(-1)
        return Routing(logits_BTE, probs_BTE, *self.pick(probs_BTE, bias_E))


class SigmoidTopK(TopK):
    """Scores s = sigmoid(logits) (DeepSeek-V3, arXiv 2412.19437). Balance losses see s / sum(s)."""

    def __call__(self, logits_BTE: Tensor, bias_E: Tensor | None = None) -> Routing:
        scores_BTE = logits_BTE.sigmoid()
        return Routing(logits_BTE, normalized(scores_BTE), *self.pick(scores_BTE, bias_E))


SELECTIONS: Mapping[str, type[TopK]] = MappingProxyType({"softmax": SoftmaxTopK, "sigmoid": SigmoidTopK})


def normalized(weights: Tensor) -> Tensor:
    """weights / their sum over the last dimension; 0 where all are 0, which would be 0/0."""
    total = weights.sum(-1, keepdim=True)
    return weights / torch.where(total > 0, total, 1)
