"""The two-layer network: W_down act(W_up x + b_up) (Vaswani et al., arXiv 1706.03762, section 3.3).

Shape suffixes: B batch, T sequence, D model width, F hidden width.
"""

import dataclasses
from types import MappingProxyType
from typing import Literal

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

ACTIVATIONS = MappingProxyType(
    {
        "gelu": F.gelu,
        "gelu_tanh": lambda x_BTF: F.gelu(x_BTF, approximate="tanh"),
        "relu": F.relu,
        "relu_squared": lambda x_BTF: F.relu(x_BTF).square(),
    }
)
Activation = Literal["gelu", "gelu_tanh", "relu", "relu_squared"]


@dataclasses.dataclass(frozen=True)
class MLPConfig(FFNConfig, kind="mlp"):
    """What came before gated FFNs, as in GPT, OPT and Pythia.

    hidden: width between the two matrices, usually four times the model's. activation: gelu is exact (arXiv
    1606.08415), gelu_tanh its approximation in GPT-2 and GPT-J, relu_squared is Primer's (arXiv 2109.08668). bias: on
    the hidden channels; the output has none, which would be added once per tensor rank.
    matrix: what its two maps are.
    """

    hidden: int
    activation: Activation = "gelu"
    bias: bool = False
    matrix: MatrixConfig = default(MatrixConfig, "dense")

    example = MappingProxyType({"hidden": 24, "bias": True})

    def __post_init__(self) -> None:
        at_least(self, 1, "hidden")

    def build(self, ctx: LayerContext) -> FFN:
        return MLP(self, ctx.d_model, ctx.output_init)


class MLP(MatrixFFN):
    """Columns of up, rows of down are split over tensor ranks; the output is then a partial sum."""

    def __init__(self, config: MLPConfig, d_model: int, output_init: Normal) -> None:
        super().__init__()
        axis = Axis("ffn", config.hidden)
        self.up = config.matrix.build(d_model, config.hidden, axis=axis, bias=config.bias)
        self.down = config.matrix.build(config.hidden, d_model, in_axis=axis, init=output_init)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x_BTD: Tensor, inputs: State, side: Side) -> Result:
        return Result(self.down(self.activation(self.up(x_BTD))))
