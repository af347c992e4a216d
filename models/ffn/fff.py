"""Fast feed-forward: a binary tree whose leaves are small networks (Belcak & Wattenhofer, arXiv 2308.14711).

Shape suffixes: B batch, T sequence, N = B*T tokens, D model width, L leaves, F width of a leaf, I = L - 1 inner nodes.
"""

import dataclasses
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor

from models.context import LayerContext
from models.conv import FanInUniform
from models.ffn.mlp import ACTIVATIONS, Activation
from models.kernels.grouped_mm import GroupedMM
from models.limits import at_least
from models.params import Constant, Normal, declare, upcast
from models.slots import FFN, FFNConfig
from models.state import Result, Side, State

MOST_LEVELS = 16
# As the authors have it: entropies of decisions closer to certain are taken here.
LEAST_DOUBT = 1e-6


@dataclasses.dataclass(frozen=True)
class FFFConfig(FFNConfig, kind="fff"):
    """In training every token runs all leaves, weighted by the product of its decisions on the way there; otherwise it
    follows its decisions to one leaf.

    depth: levels of decisions, so 2^depth leaves. leaf_hidden: width of a leaf. activation: inside a leaf.
    hardening: weight of the mean entropy of the decisions, which training drives to be certain.
    """

    depth: int
    leaf_hidden: int
    activation: Activation = "gelu"
    hardening: float = 1.0

    grows = ("leaf_hidden",)
    example = MappingProxyType({"depth": 2, "leaf_hidden": 6})

    def __post_init__(self) -> None:
        at_least(self, 1, "depth", "leaf_hidden")
        at_least(self, 0, "hardening")
        if self.depth > MOST_LEVELS:
            raise ValueError(f"depth is {self.depth}, which makes 2^{self.depth} leaves; use at most {MOST_LEVELS}")

    def build(self, ctx: LayerContext) -> FFN:
        return FFF(self, ctx.d_model, ctx.output_init)


class FFF(FFN):
    """Nodes in breadth-first order: those below node m are 2m + 1, where it decides against, and 2m + 2."""

    entry = "tokens"

    nodes: torch.nn.Parameter
    node_bias: torch.nn.Parameter
    up: torch.nn.Parameter
    up_bias: torch.nn.Parameter
    down: torch.nn.Parameter
    down_bias: torch.nn.Parameter

    def __init__(self, config: FFFConfig, d_model: int, output_init: Normal) -> None:
        super().__init__()
        self.depth, self.hardening = config.depth, config.hardening
        self.has_losses = config.hardening > 0
        self.activation = ACTIVATIONS[config.activation]
        leaves, hidden = 2**config.depth, config.leaf_hidden
        self.grouped_mm = GroupedMM(d_model, hidden)
        declare(self, "nodes", (leaves - 1, d_model), FanInUniform(d_model), role="router")
        declare(self, "node_bias", (leaves - 1,), FanInUniform(d_model))
        declare(self, "up", (leaves, d_model, hidden), Normal(0.02), role="matrix")
        declare(self, "up_bias", (leaves, hidden), Constant(0.0), decay=False)
        declare(self, "down", (leaves, hidden, d_model), output_init, role="matrix")
        declare(self, "down_bias", (leaves, d_model), Constant(0.0), decay=False)

    def forward(self, x_BTD: Tensor, inputs: State, side: Side) -> Result:
        logits_BTI = F.linear(upcast(x_BTD), upcast(self.nodes), upcast(self.node_bias))
        decisions_BTI, losses = logits_BTI.sigmoid(), {}
        if self.hardening:
            doubt_BTI = entropy(decisions_BTI).masked_fill(~side.valid_BT[..., None], 0)
            losses["hardening"] = self.hardening * doubt_BTI.sum() / doubt_BTI.shape[-1]
        if side.draws:
            out_BTD = self.all_leaves(x_BTD, self.shares(decisions_BTI).to(x_BTD.dtype))
        else:
            out_BTD = self.one_leaf(x_BTD.flatten(0, 1), self.leaf(logits_BTI.flatten(0, 1))).view_as(x_BTD)
        return Result(out_BTD, losses=losses)

    def shares(self, decisions_I: Tensor) -> Tensor:
        """Each leaf's: the product of the decisions that lead to it. [..., I] -> [..., L]."""
        shares = torch.ones_like(decisions_I[..., :1])
        for level in decisions_I.split([2**level for level in range(self.depth)], -1):
            shares = torch.stack([shares * (1 - level), shares * level], -1).flatten(-2)
        return shares

    def leaf(self, logits_NI: Tensor) -> Tensor:
        """The one that decisions lead to, of 0 or more for."""
        node_N = logits_NI.new_zeros(len(logits_NI), dtype=torch.long)
        for _ in range(self.depth):
            goes_N = logits_NI.gather(1, node_N[:, None]).squeeze(1) >= 0
            node_N = 2 * node_N + 1 + goes_N
        return node_N - (2**self.depth - 1)

    def all_leaves(self, x_BTD: Tensor, shares_BTL: Tensor) -> Tensor:
        hidden_BTLF = torch.einsum("btd,ldf->btlf", x_BTD, self.up) + self.up_bias
        shared_BTLF = self.activation(hidden_BTLF) * shares_BTL[..., None]
        return torch.einsum("btlf,lfd->btd", shared_BTLF, self.down) + shares_BTL @ self.down_bias

    def one_leaf(self, x_ND: Tensor, leaf_N: Tensor) -> Tensor:
        order_N = leaf_N.argsort(stable=True)
        sorted_N, counts_L = leaf_N[order_N], torch.bincount(leaf_N, minlength=len(self.up))
        hidden_NF = self.grouped_mm(x_ND[order_N], self.up, counts_L) + self.up_bias[sorted_N]
        out_ND = self.grouped_mm(self.activation(hidden_NF), self.down, counts_L) + self.down_bias[sorted_N]
        return torch.empty_like(out_ND).index_copy(0, order_N, out_ND)


def entropy(p: Tensor) -> Tensor:
    """Of a decision, in nats."""
    p = p.clamp(LEAST_DOUBT, 1 - LEAST_DOUBT)
    return -(p * p.log() + (1 - p) * (1 - p).log())
