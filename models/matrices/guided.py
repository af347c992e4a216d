"""Self-guided training: a dense matrix beside a structured one, faded out (Wei et al., arXiv 2406.16450, section 3.2).

Shape suffixes: N tokens, D inputs, O outputs.
"""

import dataclasses
import math
from types import MappingProxyType

import torch
from torch import Tensor, nn

from models.buffers import Buffers
from models.limits import at_least
from models.matrices.base import Matrix, MatrixConfig
from models.params import Axis, Linear, Normal


@dataclasses.dataclass(frozen=True)
class GuidedConfig(MatrixConfig, kind="guided"):
    """y = r W x + (1 - r) S x + b, with the dense W and r = (1 + cos(pi step / steps)) / 2, 0 from `steps` on.

    structured: S. steps: optimiser steps until W is gone, in the paper half of the run. W is kept in checkpoints, and
    costs its products, to the end.
    """

    structured: MatrixConfig
    steps: int

    example = MappingProxyType({"structured": {"kind": "low_rank", "rank": 6}, "steps": 3})

    def __post_init__(self) -> None:
        at_least(self, 1, "steps")

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
        dense = Linear(d_in, d_out, axis=axis, in_axis=in_axis, init=init)
        structured = self.structured.build(d_in, d_out, axis=axis, in_axis=in_axis, init=init)
        guided = Guided(dense, structured, self.steps)
        if bias:
            guided.declare_bias(d_out, axis)
        return guided


class Guided(Buffers, Matrix):
    """step: how many optimiser steps have been taken; float32 and so exact to 2^24."""

    step: Tensor

    def __init__(self, dense: nn.Module, structured: nn.Module, steps: int) -> None:
        super().__init__()
        self.dense, self.structured, self.steps = dense, structured, steps
        self.declare_buffer("step", (1,), 0.0)

    def forward(self, x_ND: Tensor) -> Tensor:
        share = (self.step.double() / self.steps).clamp(max=1.0)
        ratio = ((1 + torch.cos(math.pi * share)) / 2).to(x_ND.dtype)
        out_NO = ratio * self.dense(x_ND) + (1 - ratio) * self.structured(x_ND)
        return out_NO if self.bias is None else out_NO + self.bias

    @torch.no_grad()
    def after_step(self) -> None:
        self.step.add_(1)
