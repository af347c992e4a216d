"""Universal Transformer whose tokens stop by themselves (Dehghani et al., arXiv 1807.03819; Graves, arXiv 1603.08983).

    p_t = sigmoid(w . (H_{t-1} + P_t) + b)    a token stops at the first t with p_1 + .. + p_t > 1 - eps, or the last
    weight_t = p_t before it stops, 1 - (p_1 + .. + p_{t-1}) =: R when it does, 0 afterwards
    output = sum_t weight_t H_t,              loss = ponder_coef * (steps taken + R) per token

A token that has stopped gets nothing more: its stream is copied on, and others go on seeing it. The weights sum to 1.
Public code interpolates instead, out <- weight H + (1 - weight) out, gives tokens that never stop no remainder, and
lets stopped tokens change.
Shape suffixes: B batch, T sequence, D model width.
"""

import dataclasses
from types import MappingProxyType

import torch
from torch import Tensor

from models.context import LayerContext
from models.depth.base import DepthControl, Gated
from models.depth.universal import UniversalDepth, coordinates
from models.params import Constant, Linear, upcast
from models.slots import Closer
from models.state import Entry, Side, State

SPENT = Entry("act_spent", (), dtype=torch.float32)  # p_1 + .. + p_t, and 1 for a token that has stopped
WEIGHT = Entry("act_weight", (), dtype=torch.float32)  # of the stream after the step that is under way
OUTPUT = "act_output"  # [B, T, D]: the weighted sum up to the step before it


@dataclasses.dataclass(frozen=True)
class AdaptiveUniversalDepth(UniversalDepth, kind="universal_act"):
    """eps: what may be left over when a token stops. ponder_coef: of the loss, against as many steps as there are.
    bias: b at the start; the larger it is, the sooner tokens stop at first."""

    eps: float = 0.01
    ponder_coef: float = 0.01
    bias: float = 1.0

    example = MappingProxyType({"bias": -0.97})  # with which tokens of a small model stop at different steps

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.eps < 1:
            raise ValueError(f"eps is {self.eps}; it is what may be left over of 1, and must lie in (0, 1)")
        if self.ponder_coef < 0:
            raise ValueError(f"ponder_coef is {self.ponder_coef}; use 0, where steps cost nothing, or more")

    def build(self, ctx: LayerContext) -> DepthControl:
        period = self.period(ctx.layers)
        step, place = divmod(ctx.index, period)
        if place:
            return Inside()
        if step + 1 == ctx.num_layers // period:
            return LastStep(self, ctx.d_model, step)
        return HaltingStep(self, ctx.d_model, step, ctx.share("halting", lambda: self.halting(ctx.d_model)))

    def halting(self, d_model: int) -> Linear:
        return Linear(d_model, 1, bias=True, bias_init=Constant(self.bias), role="gate")

    def close(self, closer: Closer) -> Closer:
        return WeightedCloser(closer)


class Inside(DepthControl):
    """A layer further on in the block: runs for the tokens that its first layer ran for."""

    peeks, closes = False, True
    reads = (WEIGHT.name,)

    def forward(self, peek_BTD: Tensor | None, inputs: State, side: Side) -> Gated:
        return Gated((inputs[WEIGHT.name] > 0).to(inputs[WEIGHT.name].dtype))


class Step(DepthControl):
    """The first layer of a step."""

    closes = True

    def __init__(self, config: AdaptiveUniversalDepth, d_model: int, step: int) -> None:
        super().__init__()
        self.config, self.step, self.adds = config, step, config.scale > 0
        self.has_losses = config.ponder_coef > 0
        if step:
            self.reads = (SPENT.name, WEIGHT.name, OUTPUT) if step > 1 else (SPENT.name, WEIGHT.name)
        self.writes = (WEIGHT, Entry(OUTPUT, (d_model,))) if step else (WEIGHT,)

    def flops_per_token(self, d_model: int) -> float:
        """The output of the step before joins the weighted sum."""
        return 2 * d_model if self.step else 0

    def spend(self, coming_BTD: Tensor, spent_BT: Tensor) -> tuple[Tensor, Tensor]:
        """(p_t, which tokens stop now unless they have before). coming: the stream that the step starts from."""
        raise NotImplementedError

    def forward(self, peek_BTD: Tensor | None, inputs: State, side: Side) -> Gated:
        assert peek_BTD is not None
        writes: State = {}
        spent_BT = upcast(torch.zeros_like(peek_BTD[..., 0]))
        if self.step:
            spent_BT = inputs[SPENT.name]
            writes[OUTPUT] = weighted(inputs[WEIGHT.name], peek_BTD, inputs.get(OUTPUT))
        runs_BT = spent_BT < 1
        coming_BTD, added_BTD = peek_BTD, None
        if self.config.scale:
            added_BTD = self.config.scale * coordinates(side.positions_BT, self.step + 1, peek_BTD) * runs_BT[..., None]
            added_BTD = added_BTD.to(peek_BTD.dtype)
            coming_BTD = peek_BTD + added_BTD
        p_BT, stops_BT = self.spend(coming_BTD, spent_BT)
        stops_BT = stops_BT & runs_BT
        left_BT = (1 - spent_BT).where(stops_BT, 0)
        writes |= {WEIGHT.name: left_BT + p_BT.where(runs_BT & ~stops_BT, 0)}
        if SPENT in self.writes:
            writes[SPENT.name] = (spent_BT + p_BT).where(runs_BT & ~stops_BT, 1)
        counted_BT = runs_BT.to(spent_BT.dtype).where(side.valid_BT, 0)
        cost = self.config.ponder_coef * (counted_BT + left_BT.where(side.valid_BT, 0)).sum()
        return Gated(
            runs_BT.to(spent_BT.dtype),
            writes,
            {"ponder": cost} if self.has_losses else {},
            {"steps": counted_BT.detach().sum()},
            added_BTD,
        )


class LastStep(Step):
    """At which every token stops."""

    def spend(self, coming_BTD: Tensor, spent_BT: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(spent_BT), torch.ones_like(spent_BT, dtype=torch.bool)


class HaltingStep(Step):
    """Any other: a token stops when it has nearly spent its 1."""

    def __init__(self, config: AdaptiveUniversalDepth, d_model: int, step: int, halting: Linear) -> None:
        super().__init__(config, d_model, step)
        self.writes = (SPENT, *self.writes)
        self.halting = halting

    def spend(self, coming_BTD: Tensor, spent_BT: Tensor) -> tuple[Tensor, Tensor]:
        p_BT = upcast(self.halting(coming_BTD)[..., 0]).sigmoid()
        return p_BT, spent_BT + p_BT > 1 - self.config.eps


def weighted(weight_BT: Tensor, x_BTD: Tensor, sum_BTD: Tensor | None) -> Tensor:
    """weight x, in x's type, added to the sum so far."""
    part_BTD = (weight_BT[..., None] * x_BTD).to(x_BTD.dtype)
    return part_BTD if sum_BTD is None else sum_BTD + part_BTD


class WeightedCloser(Closer):
    """The weighted sum, whose last part is what the model would end with otherwise."""

    def __init__(self, last: Closer) -> None:
        super().__init__()
        self.last = last
        self.reads = (*last.reads, WEIGHT.name, OUTPUT)

    def forward(self, state: State) -> Tensor:
        return weighted(state[WEIGHT.name], self.last(state), state[OUTPUT])

    def flops_per_token(self, d_model: int) -> float:
        return 2 * d_model + self.last.flops_per_token(d_model)
