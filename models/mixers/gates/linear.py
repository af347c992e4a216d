"""Gates that are a linear map of the layer's input, at five places (Qiu et al., arXiv 2505.06708, section 2.2).

Shape suffixes: B batch, T sequence, D model width, H heads, V value width of a head, G = V, or 1 for one gate per head.
"""

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from models.mixers.gates.base import Gate, GateConfig, Heads
from models.params import Axis, Linear
from models.state import OwnTokens, Projected, State, Views

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType({"sigmoid": F.sigmoid, "silu": F.silu})
GATE = "attention_gate"


@dataclasses.dataclass(frozen=True)
class HeadGateConfig(GateConfig):
    """per: one gate for each channel, or one for each head. activation: of the linear map."""

    per: Literal["channel", "head"] = "channel"
    activation: Literal["sigmoid", "silu"] = "sigmoid"


@dataclasses.dataclass(frozen=True)
class OutputGateConfig(HeadGateConfig, kind="output"):
    """On what each head makes, before the output matrix: the paper's G1, and its best."""

    def build(self, heads: Heads) -> Gate:
        return OutputGate(self, heads.d_model, heads.axis, heads.width)


@dataclasses.dataclass(frozen=True)
class ValueGateConfig(HeadGateConfig, kind="values"):
    """On values: the paper's G2."""

    def build(self, heads: Heads) -> Gate:
        return ValueGate(self, heads.d_model, heads.kv_axis, heads.width)


@dataclasses.dataclass(frozen=True)
class KeyGateConfig(HeadGateConfig, kind="keys"):
    """On keys, behind their norm and before positions: the paper's G3."""

    def build(self, heads: Heads) -> Gate:
        return KeyGate(self, heads.d_model, heads.kv_axis, heads.width)


@dataclasses.dataclass(frozen=True)
class QueryGateConfig(HeadGateConfig, kind="queries"):
    """On queries, behind their norm and before positions: the paper's G4."""

    def build(self, heads: Heads) -> Gate:
        return QueryGate(self, heads.d_model, heads.axis, heads.width)


@dataclasses.dataclass(frozen=True)
class DenseGateConfig(GateConfig, kind="dense"):
    """On each channel of what the output matrix makes: the paper's G5. activation: of the linear map."""

    activation: Literal["sigmoid", "silu"] = "sigmoid"

    def build(self, heads: Heads) -> Gate:
        return DenseGate(self, heads.d_model)


class HeadGate(Gate):
    def __init__(self, config: HeadGateConfig, d_model: int, axis: Axis, width: int) -> None:
        super().__init__()
        self.activation, self.width = ACTIVATIONS[config.activation], width if config.per == "channel" else 1
        self.linear = Linear(d_model, axis.groups * self.width, axis=axis)

    def gate(self, x_BTD: Tensor) -> Tensor:
        """[B, T, H, G], of this rank's heads."""
        return self.activation(self.linear(x_BTD)).unflatten(-1, (-1, self.width))


class OutputGate(HeadGate):
    def project(self, projected: Projected, views: Views, inputs: State) -> Projected:
        return projected._replace(kept={**projected.kept, GATE: self.gate(views.q_BTD)})

    def mixed(self, out_BTHV: Tensor, kept: dict[str, Tensor]) -> Tensor:
        return out_BTHV * kept[GATE]


class ValueGate(HeadGate):
    dropped = False

    def project(self, projected: Projected, views: Views, inputs: State) -> Projected:
        if self.dropped:
            return projected
        return with_heads(projected, v=projected.heads["v"] * self.gate(views.v_BTD))

    def drop_values(self) -> None:
        self.dropped = True
        del self.linear


class KeyGate(HeadGate):
    def project(self, projected: Projected, views: Views, inputs: State) -> Projected:
        return with_heads(projected, k=projected.heads["k"] * self.gate(views.k_BTD))


class QueryGate(HeadGate):
    def project(self, projected: Projected, views: Views, inputs: State) -> Projected:
        return with_heads(projected, q=projected.heads["q"] * self.gate(views.q_BTD))


class DenseGate(Gate):
    """Made once per token, and multiplied with each rank's part of the sum, which is the same."""

    def __init__(self, config: DenseGateConfig, d_model: int) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        self.linear = Linear(d_model, d_model)

    def own_tokens(self, views: Views) -> OwnTokens:
        return OwnTokens({GATE: self.activation(self.linear(views.q_BTD))})

    def project(self, projected: Projected, views: Views, inputs: State) -> Projected:
        return projected._replace(kept={**projected.kept, GATE: inputs[GATE]})

    def merged(self, out_BTD: Tensor, kept: dict[str, Tensor]) -> Tensor:
        return out_BTD * kept[GATE]


def with_heads(projected: Projected, **heads: Tensor) -> Projected:
    return projected._replace(heads={**projected.heads, **heads})
