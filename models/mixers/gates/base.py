"""Gates on attention: places where something is multiplied by a function of the layer's input.

Shape suffixes: B batch, T sequence, D model width, H heads, V value width of a head.
"""

import dataclasses

from torch import Tensor, nn

from models.params import Axis
from models.plugin import Plugin
from models.state import OwnTokens, Projected, State, Views


@dataclasses.dataclass(frozen=True)
class Heads:
    """What a gate knows of the attention that it is built into: query heads, key/value heads, width of either."""

    d_model: int
    num: int
    kv: int
    width: int

    @property
    def axis(self) -> Axis:
        return Axis("heads", self.num)

    @property
    def kv_axis(self) -> Axis:
        return Axis("kv_heads", self.kv)


class Gate(nn.Module):
    """Takes hold of a mixer wherever it has something to multiply. The parts are those of `models.slots.Mixer`."""

    def own_tokens(self, views: Views) -> OwnTokens:
        return OwnTokens()

    def project(self, projected: Projected, views: Views, inputs: State) -> Projected:
        return projected

    def mixed(self, out_BTHV: Tensor, kept: dict[str, Tensor]) -> Tensor:
        """On what heads made."""
        return out_BTHV

    def merged(self, out_BTD: Tensor, kept: dict[str, Tensor]) -> Tensor:
        """On this rank's heads' part of the mixer's output: linear in it."""
        return out_BTD

    def drop_values(self) -> None:
        """The mixer loses its values; what acts on them goes too."""


class GateConfig(Plugin, slot="attention_gate", folder="models.mixers.gates"):
    """What is gated, and by what."""

    def build(self, heads: Heads) -> Gate:
        raise NotImplementedError
