"""Hyper-connections: several streams, read and written through one small matrix per sublayer, static or per token.

Shape suffixes: B batch, T sequence, N streams (M where they are written), D model width.
"""

import dataclasses
import math
from typing import Literal

import torch
from torch import Tensor, nn

from models.context import LayerContext
from models.kernels.handover.reading import Reading
from models.limits import above_zero, at_least
from models.params import Constant, declare
from models.residual.stream_norm import Kind, stream_norm
from models.residual.streams import StreamCloser, StreamOpener, Streams
from models.slots import Closer, Connection, Opener, ResidualConfig

Activation = Literal["tanh", "identity"]


@dataclasses.dataclass(frozen=True)
class StaticHyperConnections(ResidualConfig, kind="hyper_static"):
    """SHC: the matrices are free parameters (Zhu et al., arXiv 2409.19606, section 2). Starts as the plain residual.

    streams: how many; they start as copies of the embedding and end as a sum.
    """

    streams: int = 4

    takes_shortcut = False
    starts_plain = True

    def __post_init__(self) -> None:
        at_least(self, 1, "streams")

    def connect(self, ctx: LayerContext, branch: Literal["mixer", "ffn"], shortcut: nn.Module) -> Connection:
        return StaticHyper(ctx.d_model, self.streams, ctx.sublayer(branch))

    def open(self, d_model: int) -> Opener:
        return StreamOpener(d_model, self.streams)

    def close(self, d_model: int, num_layers: int) -> Closer:
        return StreamCloser()

    def output_gain(self) -> float:
        """The sum over the streams is as wide at initialisation as the paper's sqrt(n) rule makes it."""
        return math.sqrt(self.streams)


@dataclasses.dataclass(frozen=True)
class HyperConnections(StaticHyperConnections, kind="hyper"):
    """DHC: a part of the matrices is computed from the streams, per token (Zhu et al., arXiv 2409.19606, section 2).

    norm, norm_eps: of the streams that the matrices are computed from; layer is the paper's, rms that of the
    hyper-connections package. activation: of the computed part.
    """

    norm: Kind = "layer"
    norm_eps: float = 1e-5
    activation: Activation = "tanh"

    def __post_init__(self) -> None:
        super().__post_init__()
        above_zero(self, "norm_eps", hint=", and 1e-5 is usual")

    def connect(self, ctx: LayerContext, branch: Literal["mixer", "ffn"], shortcut: nn.Module) -> Connection:
        return DynamicHyper(self, ctx.d_model, ctx.sublayer(branch))


def activated(logits: Tensor, activation: Activation) -> Tensor:
    return logits.tanh() if activation == "tanh" else logits


@dataclasses.dataclass(frozen=True)
class StaticAlpha:
    """[N, 1 + N]: the branch reads the one stream `read`, and every stream passes on as it is."""

    read: int

    def __call__(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        identity = torch.eye(shape[0])
        return torch.cat([identity[:, self.read, None], identity], dim=1)


class StaticHyper(Streams):
    """With A [N, 1 + N] and b [N]: a = A[:, 0], m = A[:, 1:]."""

    static_alpha: nn.Parameter
    static_beta: nn.Parameter

    def __init__(self, d_model: int, streams: int, index: int) -> None:
        super().__init__(streams, d_model)
        # Without decay: it would shrink the identity path itself, which has been seen to end in NaN.
        declare(self, "static_alpha", (streams, 1 + streams), StaticAlpha(index % streams), decay=False)
        declare(self, "static_beta", (streams,), Constant(1.0), decay=False)

    def reading(self) -> Reading | None:
        return None

    def matrices(self, logits: Tensor | None) -> tuple[Tensor, Tensor]:
        """A [..., N, 1 + N] and b [..., N]."""
        return self.static_alpha, self.static_beta

    def settle(self, logits: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        alpha, beta = self.matrices(logits)
        return alpha[..., :1], alpha[..., 1:], beta[..., None, :]


class DynamicHyper(StaticHyper):
    """A = act(norm(S) W_A) s_A + A_static, b = act(norm(S) W_b) s_b + b_static: row j sees stream j alone."""

    dynamic_alpha: nn.Parameter
    dynamic_beta: nn.Parameter
    alpha_scale: nn.Parameter
    beta_scale: nn.Parameter

    def __init__(self, config: HyperConnections, d_model: int, index: int) -> None:
        super().__init__(d_model, config.streams, index)
        self.norm = stream_norm(config.norm, d_model, config.norm_eps)
        self.activation: Activation = config.activation
        declare(self, "dynamic_alpha", (d_model, 1 + config.streams), Constant(0.0), role="gate")
        declare(self, "dynamic_beta", (d_model, 1), Constant(0.0), role="gate")
        declare(self, "alpha_scale", (1,), Constant(0.01))
        declare(self, "beta_scale", (1,), Constant(0.01))

    def reading(self) -> Reading:
        columns = torch.cat([self.dynamic_alpha, self.dynamic_beta], dim=1)
        static_N1 = self.static_alpha[:, :1]
        return Reading(*self.norm.operands(columns), static_N1, self.alpha_scale, self.activation, stride=1)

    def matrices(self, logits: Tensor | None) -> tuple[Tensor, Tensor]:
        assert logits is not None
        dynamic = activated(logits, self.activation)
        alpha = torch.addcmul(self.static_alpha, dynamic[..., :-1], self.alpha_scale)
        return alpha, torch.addcmul(self.static_beta, dynamic[..., -1], self.beta_scale)

    def flops_per_token(self, d_model: int) -> float:
        columns = self.dynamic_alpha.numel() + self.dynamic_beta.numel()
        return super().flops_per_token(d_model) + 2 * (self.streams - 1) * columns
