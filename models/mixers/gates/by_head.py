"""One gate per head: a constant, or made of the head's own slice of the input (Bondarenko et al., arXiv 2306.12929).

Shape suffixes: B batch, T sequence, H heads, C channels of a slice.
"""

import dataclasses
import math

import torch
from torch import Tensor, nn

from models.mixers.gates.base import Gate, GateConfig, Heads
from models.mixers.gates.linear import GATE
from models.params import Constant, Normal, declare
from models.state import OwnTokens, Projected, State, Views


@dataclasses.dataclass(frozen=True)
class ByHeadConfig(GateConfig):
    """start: the gate at the first step, in (0, 1); the paper's OPT starts at 0.25."""

    start: float = 0.25

    def __post_init__(self) -> None:
        if not 0 < self.start < 1:
            raise ValueError(f"start is {self.start}; a gate is a sigmoid, let it start in (0, 1)")

    @property
    def logit(self) -> Constant:
        return Constant(math.log(self.start / (1 - self.start)))


@dataclasses.dataclass(frozen=True)
class ConstantGateConfig(ByHeadConfig, kind="constant"):
    """On what a head makes: the sigmoid of one learned number."""

    def build(self, heads: Heads) -> Gate:
        return ConstantGate(self, heads)


@dataclasses.dataclass(frozen=True)
class SliceGateConfig(ByHeadConfig, kind="slice"):
    """On what head h makes of a token: the sigmoid of a linear map of channels h D/H ... (h + 1) D/H of its input."""

    def build(self, heads: Heads) -> Gate:
        if heads.d_model % heads.num:
            raise ValueError(
                f"a gate of kind slice cuts d_model {heads.d_model} into num_heads {heads.num} equal parts; change "
                "one, or use the gate {kind: output, per: head}, which sees the whole input"
            )
        return SliceGate(self, heads)


class ConstantGate(Gate):
    weight: nn.Parameter

    def __init__(self, config: ConstantGateConfig, heads: Heads) -> None:
        super().__init__()
        declare(self, "weight", (heads.num,), config.logit, (heads.axis,))

    def mixed(self, out_BTHV: Tensor, kept: dict[str, Tensor]) -> Tensor:
        return out_BTHV * self.weight.sigmoid()[:, None]


class SliceGate(Gate):
    """Made of the rank's own tokens for all heads, because a tensor rank's heads do not say which slices are theirs."""

    weight: nn.Parameter
    bias: nn.Parameter

    def __init__(self, config: SliceGateConfig, heads: Heads) -> None:
        super().__init__()
        # A wider model has more slices, not wider ones.
        declare(self, "weight", (heads.num, heads.d_model // heads.num), Normal(0.02), role="gate", wide=False)
        declare(self, "bias", (heads.num,), config.logit)

    def own_tokens(self, views: Views) -> OwnTokens:
        return OwnTokens(made_by_head={GATE: of_slices(views.q_BTD, self.weight, self.bias)})

    def project(self, projected: Projected, views: Views, inputs: State) -> Projected:
        return projected._replace(kept={**projected.kept, GATE: inputs[GATE]})

    def mixed(self, out_BTHV: Tensor, kept: dict[str, Tensor]) -> Tensor:
        return out_BTHV * kept[GATE]


def of_slices(x_BTD: Tensor, weight_HC: Tensor, bias_H: Tensor) -> Tensor:
    """[B, T, H, 1]"""
    x_BTHC = x_BTD.unflatten(-1, weight_HC.shape)
    return (torch.einsum("bthc,hc->bth", x_BTHC, weight_HC) + bias_H).sigmoid()[..., None]
