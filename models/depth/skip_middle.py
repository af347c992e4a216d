"""Skip-middle: a token may skip a span of middle layers, from the middle outwards (arXiv 2506.21103).

    S_l = S_{l-1} + relu(w_l . h_l + b_l),    gate_l = 1 - clamp(S_l, 0, 1),    gate_{L-1-l} = gate_l,    l < L / 2

h_l is the input of layer l. S never falls, so a token that is shut out of layer l stays out until layer L-1-l is done.
The gate multiplies both branches' outputs, and its log is added to the attention logits of the token's key.
Shape suffixes: B batch, T sequence, D model width.
"""

import dataclasses
from typing import ClassVar, Self

import torch
from torch import Tensor

from models.context import LayerContext
from models.limits import at_least
from models.params import Linear, upcast
from models.slots import DepthConfig, DepthControl
from models.state import Entry, Side, State


@dataclasses.dataclass(frozen=True)
class SkipMiddleDepth(DepthConfig, kind="skip_middle"):
    """sparsity: weight in the loss of the gates' mean over layers and tokens; 0 leaves the gates to the main loss.

    The gates are soft: they scale branches, and no computation is saved.
    """

    sparsity: float = 0.0

    gates_keys: ClassVar[bool] = True
    mirrors: ClassVar[bool] = True

    def __post_init__(self) -> None:
        at_least(self, 0, "sparsity", hint=", since less would pay for gates that stay open")

    def canonical(self, d_model: int) -> Self:
        return dataclasses.replace(self, sparsity=0.0)

    def build(self, ctx: LayerContext) -> DepthControl:
        weight = self.sparsity / ctx.num_layers
        mirror = ctx.num_layers - 1 - ctx.index
        return Gate(ctx.d_model, ctx.index, weight) if ctx.index < mirror else Mirror(mirror, weight)


@dataclasses.dataclass(frozen=True)
class UngatedKeysSkipMiddleDepth(SkipMiddleDepth, kind="skip_middle_ungated_keys"):
    """As the authors' released code computes it: its log gate lies along the queries, where the softmax cancels it."""

    gates_keys: ClassVar[bool] = False


def name(index: int) -> str:
    return f"gate_sum.{index}"


class Openness(DepthControl):
    """From the sum S to the gate, and to what the gate costs. weight: of one token's gate in the loss."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = weight
        self.has_losses = weight != 0

    def report(self, sum_BT: Tensor, side: Side) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """(gate [B, T], losses, stats), the latter two summed over this rank's valid tokens."""
        gate_BT = 1 - sum_BT.clamp(0, 1)
        total = gate_BT.where(side.valid_BT, 0).sum()
        return gate_BT, {"sparsity": self.weight * total} if self.has_losses else {}, {"gate": total.detach()}


class Gate(Openness):
    """A layer of the first half: adds to the sum what it reads from its input."""

    def __init__(self, d_model: int, index: int, weight: float) -> None:
        super().__init__(weight)
        self.own, self.before = name(index), name(index - 1) if index else None
        self.reads = () if self.before is None else (self.before,)
        # At least float32: 1 - S has no digits left in bfloat16 where S is near 1.
        self.writes = (Entry(self.own, (), dtype=torch.float32),)
        # Not zero: relu has no gradient at 0, so a gate that starts at w = b = 0 is stuck at "every layer runs".
        self.proj = Linear(d_model, 1, bias=True, role="gate")

    def forward(
        self, peek_BTD: Tensor | None, inputs: State, side: Side
    ) -> tuple[Tensor | None, State, dict[str, Tensor], dict[str, Tensor]]:
        assert peek_BTD is not None
        sum_BT = upcast(self.proj(peek_BTD))[..., 0].relu()
        if self.before is not None:
            sum_BT = inputs[self.before] + sum_BT
        gate_BT, losses, stats = self.report(sum_BT, side)
        return gate_BT, {self.own: sum_BT}, losses, stats


class Mirror(Openness):
    """A layer of the second half: opens as far as its counterpart of the first."""

    peeks = False

    def __init__(self, mirror: int, weight: float) -> None:
        super().__init__(weight)
        self.reads = (name(mirror),)

    def forward(
        self, peek_BTD: Tensor | None, inputs: State, side: Side
    ) -> tuple[Tensor | None, State, dict[str, Tensor], dict[str, Tensor]]:
        gate_BT, losses, stats = self.report(inputs[self.reads[0]], side)
        return gate_BT, {}, losses, stats
