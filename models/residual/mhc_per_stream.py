"""Manifold-constrained hyper-connections whose small matrices see one stream per row.

Shape suffixes: B batch, T sequence, N streams, D model width.
"""

import dataclasses
from typing import Literal

from torch import Tensor, nn

from models.context import LayerContext
from models.residual.mhc import ManifoldHyperConnections, SinkhornHyper
from models.slots import Connection


@dataclasses.dataclass(frozen=True)
class PerStreamManifoldHyperConnections(ManifoldHyperConnections, kind="mhc_per_stream"):
    """mHC as the hyper-connections package has it: row j of the small matrices is computed from stream j alone, as in
    hyper, with a norm and columns that all rows share. Starts as the plain residual, which the package's does not.

    streams, iterations, norm_eps: as in mhc.
    """

    def connect(self, ctx: LayerContext, branch: Literal["mixer", "ffn"], shortcut: nn.Module) -> Connection:
        return PerStreamHyper(self, ctx.d_model, ctx.sublayer(branch))


class PerStreamHyper(SinkhornHyper):
    """Row j of the logits from stream j: norm(S_j) W."""

    def __init__(self, config: ManifoldHyperConnections, d_model: int, index: int) -> None:
        super().__init__(config, d_model, index, d_model, (1 + config.streams, 1))

    def logits_of_read(self) -> tuple[Tensor, int, bool]:
        return self.static_alpha[:, :1], 1, False

    def flops_per_token(self, d_model: int) -> float:
        columns = self.dynamic_alpha.numel() + self.dynamic_beta.numel()
        return super().flops_per_token(d_model) + 2 * (self.streams - 1) * columns
