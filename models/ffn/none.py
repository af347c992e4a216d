"""No channel mixing: a layer is its mixer alone."""

import dataclasses

from torch import Tensor

from models.context import LayerContext
from models.pieces import WHOLE, Part
from models.slots import FFN, FFNConfig
from models.state import Result, Side, State


@dataclasses.dataclass(frozen=True)
class NoneConfig(FFNConfig, kind="none"):
    """No channel mixing: what is added to the stream is 0, as in models that are made of mixers alone (Zoology, arXiv
    2312.04927). A norm and a connection stand around it all the same, and learn nothing."""

    def build(self, ctx: LayerContext) -> FFN:
        return NoFFN()


class NoFFN(FFN):
    entry = "tokens"
    by_part = True

    def forward(self, x_BTD: Tensor, inputs: State, side: Side, part: Part = WHOLE) -> Result:
        # A product, so that every parameter has a gradient, which ranks that sum gradients wait for.
        return Result(x_BTD * 0)
