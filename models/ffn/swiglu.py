"""SwiGLU: W_down (silu(W_gate x) * W_up x) (Shazeer, arXiv 2002.05202).

Shape suffixes: B batch, T sequence, D model width.
"""

import dataclasses
from types import MappingProxyType

import torch.nn.functional as F
from torch import Tensor

from models.config import default
from models.context import LayerContext
from models.ffn.of_matrices import MatrixFFN
from models.limits import at_least
from models.matrices.base import MatrixConfig
from models.params import Axis, Normal
from models.slots import FFN, FFNConfig
from models.state import Result, Side, State


@dataclasses.dataclass(frozen=True)
class SwiGLUConfig(FFNConfig, kind="swiglu"):
    """hidden: width between the projections; about 8/3 of the model width gives the parameters of a 4x MLP.
    matrix: what its three maps are."""

    hidden: int
    matrix: MatrixConfig = default(MatrixConfig, "dense")

    example = MappingProxyType({"hidden": 24})

    def __post_init__(self) -> None:
        at_least(self, 1, "hidden")

    def build(self, ctx: LayerContext) -> FFN:
        return SwiGLU(self, ctx.d_model, ctx.output_init)


class SwiGLU(MatrixFFN):
    """Columns of gate and up, rows of down are split over tensor ranks; the output is then a partial sum."""

    def __init__(self, config: SwiGLUConfig, d_model: int, output_init: Normal) -> None:
        super().__init__()
        hidden, axis = config.hidden, Axis("ffn", config.hidden)
        self.gate = config.matrix.build(d_model, hidden, axis=axis)
        self.up = config.matrix.build(d_model, hidden, axis=axis)
        self.down = config.matrix.build(hidden, d_model, in_axis=axis, init=output_init)

    def forward(self, x_BTD: Tensor, inputs: State, side: Side) -> Result:
        return Result(self.down(F.silu(self.gate(x_BTD)) * self.up(x_BTD)))
