"""A dense matrix."""

import dataclasses

from torch import nn

from models.matrices.base import MatrixConfig
from models.params import Axis, Linear, Normal


@dataclasses.dataclass(frozen=True)
class DenseConfig(MatrixConfig, kind="dense"):
    """Every input to every output."""

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
        return Linear(d_in, d_out, axis=axis, in_axis=in_axis, init=init, bias=bias)
