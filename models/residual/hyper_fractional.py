"""Fractional hyper-connections: every stream is cut into fractions, which are connected as streams are.

Shape suffixes: B batch, T sequence, N streams, P fractions (Q where they are written), R = N P rows, as they lie, D
model width, C = D / P width of a fraction.
"""

import dataclasses
from typing import Literal

import torch
from torch import Tensor, nn

from models.context import LayerContext
from models.kernels.handover.reading import Reading
from models.limits import at_least
from models.params import Constant, declare
from models.residual.hyper import Activation, HyperConnections, activated
from models.residual.stream_norm import stream_norm
from models.residual.streams import Streams, stream_sums
from models.slots import Connection


@dataclasses.dataclass(frozen=True)
class FractionalHyperConnections(HyperConnections, kind="hyper_fractional"):
    """Frac-connections (arXiv 2503.14125) over any number of streams. Starts as the plain residual.

    fractions: how many equal parts the width is cut into. streams: 1 is the paper's, which widens nothing.
    norm, norm_eps, activation: as in hyper.
    """

    streams: int = 1
    fractions: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "fractions")

    def connect(self, ctx: LayerContext, branch: Literal["mixer", "ffn"], shortcut: nn.Module) -> Connection:
        if ctx.d_model % self.fractions:
            raise ValueError(
                f"d_model {ctx.d_model} is not a multiple of fractions {self.fractions}; change one of them"
            )
        return FractionalHyper(self, ctx.d_model, ctx.sublayer(branch))


@dataclasses.dataclass(frozen=True)
class FractionalAlpha:
    """[P N, Q (1 + N)]: every fraction of the branch input comes from stream `read`, and everything passes on."""

    read: int
    streams: int

    def __call__(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        identity_NN = torch.eye(self.streams)
        alpha = torch.cat([identity_NN[:, self.read, None], identity_NN], dim=1)
        return torch.kron(torch.eye(shape[0] // self.streams), alpha)


@dataclasses.dataclass(frozen=True)
class FractionalBeta:
    """[P, N, Q]: fraction p of the output joins fraction p of every stream."""

    def __call__(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return torch.eye(shape[0])[:, None].expand(shape).clone()


class FractionalHyper(Streams):
    """With rows X[p, j] in R^C (fraction p of stream j) and A [P, N, Q, 1 + N], b [P, N, Q] from norm(X) as in hyper:
    u[q] = sum_pj A[p, j, q, 0] X[p, j], and X[q, i] <- sum_pj A[p, j, q, 1 + i] X[p, j] + sum_p b[p, i, q] F(u)[p]."""

    static_alpha: nn.Parameter
    static_beta: nn.Parameter
    dynamic_alpha: nn.Parameter
    dynamic_beta: nn.Parameter
    alpha_scale: nn.Parameter
    beta_scale: nn.Parameter

    def __init__(self, config: FractionalHyperConnections, d_model: int, index: int) -> None:
        super().__init__(config.streams, d_model)
        self.fractions, streams = (fractions := config.fractions), config.streams
        width, columns = d_model // fractions, fractions * (1 + streams)
        self.norm = stream_norm(config.norm, width, config.norm_eps)
        self.activation: Activation = config.activation
        alpha = FractionalAlpha(index % streams, streams)
        declare(self, "static_alpha", (fractions * streams, columns), alpha, decay=False)
        declare(self, "static_beta", (fractions, streams, fractions), FractionalBeta(), decay=False)
        declare(self, "dynamic_alpha", (width, columns), Constant(0.0), role="gate")
        declare(self, "dynamic_beta", (width, fractions), Constant(0.0), role="gate")
        declare(self, "alpha_scale", (1,), Constant(0.01))
        declare(self, "beta_scale", (1,), Constant(0.01))

    def rows(self, streams_BTND: Tensor) -> Tensor:
        return streams_BTND.unflatten(-1, (self.fractions, -1)).flatten(-3, -2)

    def parts(self, out_BTD: Tensor) -> Tensor:
        return out_BTD.unflatten(-1, (self.fractions, -1))

    def streams_of(self, rows_BTRD: Tensor) -> Tensor:
        return rows_BTRD.unflatten(-2, (self.streams, -1)).flatten(-2)

    def by_row(self) -> Tensor:
        """static_alpha [R, Q (1 + N)], in the order in which rows lie."""
        return self.static_alpha.unflatten(0, (self.fractions, -1)).transpose(0, 1).flatten(0, 1)

    def reading(self) -> Reading:
        columns = torch.cat([self.dynamic_alpha, self.dynamic_beta], dim=1)
        stride = 1 + self.streams
        return Reading(
            *self.norm.operands(columns), self.by_row()[:, ::stride], self.alpha_scale, self.activation, stride
        )

    def settle(self, logits: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        assert logits is not None
        dynamic = activated(logits, self.activation)
        dynamic_alpha, dynamic_beta = dynamic.tensor_split([self.static_alpha.shape[1]], dim=-1)
        alpha = torch.addcmul(self.by_row(), dynamic_alpha, self.alpha_scale)
        alpha_BTRQM = alpha.unflatten(-1, (self.fractions, -1))
        dynamic_beta = dynamic_beta.unflatten(-2, (self.streams, self.fractions)).transpose(-3, -2)
        beta_BTPNQ = torch.addcmul(self.static_beta, dynamic_beta, self.beta_scale)
        return alpha_BTRQM[..., 0], alpha_BTRQM[..., 1:].transpose(-1, -2).flatten(-2), beta_BTPNQ.flatten(-2)

    def flops_per_token(self, d_model: int) -> float:
        """Every sum of hyper is one over the fractions too."""
        columns = self.dynamic_alpha.numel() + self.dynamic_beta.numel()
        again = 2 * (self.fractions * self.streams - 1) * columns
        return self.fractions * stream_sums(self.streams, d_model) + again
