"""The slot of a map between widths: what stands where an FFN would have one dense matrix."""

from torch import Tensor, nn

from models.params import Axis, Constant, Normal, declare
from models.plugin import Plugin


class Matrix(nn.Module):
    """[..., inputs] -> [..., outputs], token-wise. Of a split axis this rank has its part: of the outputs, or of the
    inputs, and then its output is a part of a sum over tensor ranks."""

    bias: nn.Parameter | None

    def __init__(self) -> None:
        super().__init__()
        self.register_parameter("bias", None)

    def forward(self, x_ND: Tensor) -> Tensor:
        raise NotImplementedError

    def declare_bias(self, d_out: int, axis: Axis | None) -> None:
        declare(self, "bias", (d_out,), Constant(0.0), (axis,))

    def after_step(self) -> None:
        """Once per optimiser step."""


class MatrixConfig(Plugin, slot="matrix", folder="models.matrices"):
    """One map of an FFN."""

    def build(
        self,
        d_in: int,
        d_out: int,
        *,
        axis: Axis | None = None,
        in_axis: Axis | None = None,
        init: Normal | None = None,
        bias: bool = False,
    ) -> nn.Module:
        """axis splits outputs, in_axis inputs; at most one is given. init: of the dense matrix in whose place this is;
        its outputs are as large at the start. bias: a learned one, 0 at the start, on the outputs; not beside in_axis,
        where every tensor rank would add it. Raises ValueError for widths that it cannot map."""
        raise NotImplementedError
