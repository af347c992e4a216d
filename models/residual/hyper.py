"""Hyper-connections: several streams, read and written through one small matrix per sublayer, static or per token.

Shape suffixes: B batch, T sequence, N streams (M where they are written), D model width.
"""

import dataclasses
import math
from typing import Literal

import torch
from torch import Tensor, nn

from models.context import LayerContext
from models.kernels.stream_mix import StreamMix
from models.limits import above_zero, at_least
from models.params import Constant, declare
from models.residual.stream_norm import Kind, stream_norm
from models.slots import Closer, Connection, Opener, ResidualConfig
from models.state import Entry, State, Views


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
    activation: Literal["tanh", "identity"] = "tanh"

    def __post_init__(self) -> None:
        super().__post_init__()
        above_zero(self, "norm_eps", hint=", and 1e-5 is usual")

    def connect(self, ctx: LayerContext, branch: Literal["mixer", "ffn"], shortcut: nn.Module) -> Connection:
        return DynamicHyper(self, ctx.d_model, ctx.sublayer(branch))


def stream_sums(streams: int, d_model: int) -> float:
    """FLOPs per token of a branch's input from n streams (2 n D), of their mix (2 n^2 D) and of what the branch adds to
    each of them (2 n D)."""
    return 2 * streams * (streams + 2) * d_model


@dataclasses.dataclass(frozen=True)
class StaticAlpha:
    """[N, 1 + N]: the branch reads the one stream `read`, and every stream passes on as it is."""

    read: int

    def __call__(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        identity = torch.eye(shape[0])
        return torch.cat([identity[:, self.read, None], identity], dim=1)


class StaticHyper(Connection):
    """With the streams S [N, D] of a token, A [N, 1 + N] and b [N]: branch input u = A[:, 0]^T S, and
    S <- A[:, 1:]^T S + b F(u)^T."""

    reads = stream = ("streams",)
    static_alpha: nn.Parameter
    static_beta: nn.Parameter

    def __init__(self, d_model: int, streams: int, index: int) -> None:
        super().__init__()
        self.streams = streams
        self.writes = (Entry("streams", (streams, d_model)),)
        self.mix = StreamMix()
        # Without decay: it would shrink the identity path itself, which has been seen to end in NaN.
        declare(self, "static_alpha", (streams, 1 + streams), StaticAlpha(index % streams), decay=False)
        declare(self, "static_beta", (streams,), Constant(1.0), decay=False)

    def weights(self, streams_BTND: Tensor) -> tuple[Tensor, Tensor]:
        """Returns A [..., N, 1 + N] and b [..., N] in the streams' dtype."""
        return self.static_alpha.to(streams_BTND.dtype), self.static_beta.to(streams_BTND.dtype)

    def read(self, state: State) -> tuple[Views, State]:
        streams_BTND = state["streams"]
        alpha, beta = self.weights(streams_BTND)
        x_BT1D = self.mix(streams_BTND, alpha[..., :1])
        return Views.same(x_BT1D.squeeze(-2)), {"mix": alpha[..., 1:], "beta": beta}

    def write(self, state: State, kept: State, out_BTD: Tensor) -> State:
        # Mixed here, not in `read`, so that one set of streams and not two lives while the branch runs.
        return {
            **state,
            "streams": self.mix(state["streams"], kept["mix"], out_BTD[..., None, :], kept["beta"][..., None, :]),
        }

    def peek(self, state: State) -> Tensor:
        """The mean over the streams, which at initialisation is the plain residual's stream."""
        return state["streams"].mean(-2)

    def add(self, state: State, x_BTD: Tensor) -> State:
        return {**state, "streams": state["streams"] + x_BTD[..., None, :]}

    def flops_per_token(self, d_model: int) -> float:
        return stream_sums(self.streams, d_model)


class DynamicHyper(StaticHyper):
    """A = act(norm(S) W_A) s_A + A_static, b = act(norm(S) W_b) s_b + b_static: row j sees stream j alone."""

    dynamic_alpha: nn.Parameter
    dynamic_beta: nn.Parameter
    alpha_scale: nn.Parameter
    beta_scale: nn.Parameter

    def __init__(self, config: HyperConnections, d_model: int, index: int) -> None:
        super().__init__(d_model, config.streams, index)
        self.norm = stream_norm(config.norm, d_model, config.norm_eps)
        self.activation = nn.Tanh() if config.activation == "tanh" else nn.Identity()
        declare(self, "dynamic_alpha", (d_model, 1 + config.streams), Constant(0.0), role="gate")
        declare(self, "dynamic_beta", (d_model, 1), Constant(0.0), role="gate")
        declare(self, "alpha_scale", (1,), Constant(0.01))
        declare(self, "beta_scale", (1,), Constant(0.01))

    def weights(self, streams_BTND: Tensor) -> tuple[Tensor, Tensor]:
        columns = torch.cat([self.dynamic_alpha, self.dynamic_beta], dim=1)
        dynamic = self.activation(self.norm(streams_BTND, columns))
        alpha = torch.addcmul(self.static_alpha, dynamic[..., :-1], self.alpha_scale)
        beta = torch.addcmul(self.static_beta, dynamic[..., -1], self.beta_scale)
        return alpha.to(streams_BTND.dtype), beta.to(streams_BTND.dtype)

    def flops_per_token(self, d_model: int) -> float:
        columns = self.dynamic_alpha.numel() + self.dynamic_beta.numel()
        return super().flops_per_token(d_model) + 2 * (self.streams - 1) * columns


class StreamOpener(Opener):
    """The embedding, once per stream."""

    def __init__(self, d_model: int, streams: int) -> None:
        super().__init__(d_model)
        self.streams = streams
        self.writes = (Entry("streams", (streams, d_model)),)

    def forward(self, x_BTD: Tensor) -> State:
        return {"streams": torch.stack([x_BTD] * self.streams, dim=-2)}


class StreamCloser(Closer):
    """The sum over the streams (section 2 of the paper)."""

    reads = ("streams",)

    def forward(self, state: State) -> Tensor:
        return state["streams"].sum(-2)
