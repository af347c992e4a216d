"""Skip-middle: a token may skip a span of middle layers, from the middle outwards (arXiv 2506.21103).

    S_l = S_{l-1} + relu(w_l . h_l + b_l),    gate_l = 1 - clamp(S_l, 0, 1),    gate_{L-1-l} = gate_l,    l < L / 2

h_l is the input of layer l. S never falls, so a token that is shut out of layer l stays out until layer L-1-l is done.
The gate multiplies both branches' outputs, and its log is added to the attention logits of the token's key.
Shape suffixes: B batch, T sequence, D model width, L layers.
"""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, Self

import torch
from torch import Tensor

from models.buffers import Buffers
from models.context import LayerContext
from models.depth.base import DepthConfig, DepthControl, Gated
from models.depth.controllers.base import GateController, penalty
from models.ffn.groups import Grouped
from models.params import Linear, upcast
from models.state import Entry, Side, State


@dataclasses.dataclass(frozen=True)
class SkipMiddleDepth(DepthConfig, kind="skip_middle"):
    """controller: what the gates cost in the loss; null leaves them to the main loss. key_floor: the least that a key's
    gate counts in the mixers; the authors' code has 1e-6, and with 0 a token that is shut out is not seen at all.

    Gates are soft in training, where every layer runs for every token. Without gradients a branch runs for the tokens
    whose gate is above 0, where nothing depends on the others: FFNs, and with key_floor 0 attention.
    """

    controller: GateController | None = None
    key_floor: float = 0.0

    gates_keys: ClassVar[bool] = True
    mirrors: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.key_floor < 1:
            raise ValueError(f"key_floor is {self.key_floor}; it must lie in [0, 1), and 0 hides closed tokens")

    def canonical(self, d_model: int) -> Self:
        return dataclasses.replace(self, controller=None)

    def build(self, ctx: LayerContext) -> DepthControl:
        mirror = ctx.num_layers - 1 - ctx.index
        if ctx.index > mirror:
            return Mirror(mirror, self.key_floor)
        if ctx.index + 1 < mirror or self.controller is None:
            return Gate(ctx.d_model, ctx.index, self.key_floor)
        self.controller.check_layers(ctx.num_layers)
        return ControlledGate(ctx.d_model, ctx.index, self.key_floor, self.controller)


@dataclasses.dataclass(frozen=True)
class UngatedKeysSkipMiddleDepth(SkipMiddleDepth, kind="skip_middle_ungated_keys"):
    """As the authors' released code computes it: its log gate lies along the queries, where the softmax cancels it."""

    gates_keys: ClassVar[bool] = False


def name(index: int) -> str:
    return f"gate_sum.{index}"


def opened(sum_: Tensor) -> Tensor:
    """From the sum S to the gate."""
    return 1 - sum_.clamp(0, 1)


class Openness(DepthControl):
    """From the sum S to the gate of a layer."""

    closes = True

    def __init__(self, key_floor: float) -> None:
        super().__init__()
        self.key_floor = key_floor

    def key_gate(self, gate_BT: Tensor) -> Tensor:
        return gate_BT.clamp_min(self.key_floor)

    def report(self, gate_BT: Tensor, side: Side) -> dict[str, Tensor]:
        """The sum of the gates of this rank's valid tokens."""
        return {"gate": gate_BT.detach().where(side.valid_BT, 0).sum()}


class Gate(Openness):
    """A layer of the first half: adds to the sum what it reads from its input."""

    def __init__(self, d_model: int, index: int, key_floor: float) -> None:
        super().__init__(key_floor)
        self.own, self.before = name(index), name(index - 1) if index else None
        self.reads = () if self.before is None else (self.before,)
        # At least float32: 1 - S has no digits left in bfloat16 where S is near 1.
        self.writes = (Entry(self.own, (), dtype=torch.float32),)
        # Not zero: relu has no gradient at 0, so a gate that starts at w = b = 0 is stuck at "every layer runs".
        self.proj = Linear(d_model, 1, bias=True, role="gate")

    def forward(self, peek_BTD: Tensor | None, inputs: State, side: Side) -> Gated:
        assert peek_BTD is not None
        sum_BT = upcast(self.proj(peek_BTD))[..., 0].relu()
        if self.before is not None:
            sum_BT = inputs[self.before] + sum_BT
        gate_BT = opened(sum_BT)
        return Gated(gate_BT, {self.own: sum_BT}, stats=self.report(gate_BT, side))


class ControlledGate(Gate, Buffers, Grouped):
    """The last layer of the first half, which every gate reaches: it also has the controller of them all."""

    has_losses = True

    def __init__(self, d_model: int, index: int, key_floor: float, controller: GateController) -> None:
        super().__init__(d_model, index, key_floor)
        self.controller = controller
        self.group = controller.stats_group
        self.reads = tuple(name(earlier) for earlier in range(index))
        for level, value in controller.levels().items():
            self.declare_buffer(level, (2 * (index + 1),), value)

    def levels(self, like: Tensor) -> dict[str, Tensor]:
        return {level: getattr(self, level).to(like) for level in self.controller.levels()}

    def forward(self, peek_BTD: Tensor | None, inputs: State, side: Side) -> Gated:
        gated = super().forward(peek_BTD, inputs, side)
        half_BTL = opened(torch.stack([*(inputs[key] for key in self.reads), gated.writes[self.own]], dim=-1))
        gates_BTL = torch.cat([half_BTL, half_BTL.flip(-1)], dim=-1)
        cost = penalty(gates_BTL, side.valid_BT, self.controller, self.levels(gates_BTL), self.peers.sum)
        own_BTL = gates_BTL.detach().double().where(side.valid_BT[..., None], 0)
        sums = {"gates": own_BTL.sum((0, 1)), "squares": own_BTL.square().sum((0, 1)), "tokens": side.valid_BT.sum()}
        return gated._replace(losses={"gates": cost}, stats={**gated.stats, **sums})

    @torch.no_grad()
    def after_step(self, stats: Mapping[str, Tensor]) -> None:
        """The controller's update, from the gates of the whole step."""
        count = stats["tokens"].clamp_min(1)
        mean_L, square_L = (stats[key].double() / count for key in ("gates", "squares"))
        levels = self.levels(mean_L)
        for level, value in self.controller.update(levels, mean_L, square_L - mean_L.square()).items():
            buffer = getattr(self, level)
            buffer.copy_(value.to(buffer))


class Mirror(Openness):
    """A layer of the second half: opens as far as its counterpart of the first."""

    peeks = False

    def __init__(self, mirror: int, key_floor: float) -> None:
        super().__init__(key_floor)
        self.reads = (name(mirror),)

    def forward(self, peek_BTD: Tensor | None, inputs: State, side: Side) -> Gated:
        gate_BT = opened(inputs[self.reads[0]])
        return Gated(gate_BT, stats=self.report(gate_BT, side))
