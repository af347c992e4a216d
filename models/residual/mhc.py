"""Manifold-constrained hyper-connections: streams are mixed by a doubly stochastic matrix, so that their mean passes
through any depth as it is.

Shape suffixes: B batch, T sequence, N streams (M where they are written), D model width.
"""

import dataclasses
import math
from typing import Literal

import torch
from torch import Tensor, nn

from models.context import LayerContext
from models.kernels.sinkhorn import Sinkhorn
from models.kernels.stream_mix import StreamMix
from models.limits import above_zero, at_least
from models.params import Constant, declare
from models.residual.hyper import StreamCloser, StreamOpener, stream_sums
from models.residual.stream_norm import OffsetRMSNorm
from models.slots import Closer, Connection, Opener, ResidualConfig
from models.state import Entry, State, Views

FAR = -8.0  # logit of what is next to nothing at first


@dataclasses.dataclass(frozen=True)
class ManifoldConfig(ResidualConfig):
    """What all kinds of mHC have.

    streams: how many; they start as copies of the embedding and end as a sum. norm_eps: of the norm in front of the
    small matrices.
    """

    streams: int = 4
    norm_eps: float = 1e-6

    takes_shortcut = False
    starts_plain = True

    def __post_init__(self) -> None:
        at_least(self, 2, "streams", hint=", so that there is something to mix")
        above_zero(self, "norm_eps", hint=", and 1e-6 is usual")

    def open(self, d_model: int) -> Opener:
        return StreamOpener(d_model, self.streams)

    def close(self, d_model: int, num_layers: int) -> Closer:
        return StreamCloser()


@dataclasses.dataclass(frozen=True)
class ManifoldHyperConnections(ManifoldConfig, kind="mhc"):
    """mHC (Xie et al., arXiv 2512.24880, section 4): all small matrices of a token are computed from all its streams.
    Starts as the plain residual.

    streams: how many; they start as copies of the embedding and end as a sum. norm_eps: of the norm in front of the
    small matrices. iterations: of Sinkhorn-Knopp.
    """

    iterations: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "iterations", hint=", and 20 is usual")

    def connect(self, ctx: LayerContext, branch: Literal["mixer", "ffn"], shortcut: nn.Module) -> Connection:
        return FlatHyper(self, ctx.d_model, ctx.sublayer(branch))


@dataclasses.dataclass(frozen=True)
class OneStreamReads:
    """[N, 1 + N]: stream `read` makes up 3/4 of the branch input, the others the rest; streams are next to unmixed.

    All streams start equal, so the branch reads what the plain residual's does; but with equal parts all would get
    equal gradients, and stay copies for ever. -8 off the diagonal is the mHC-lite code's.
    """

    read: int

    def pre(self, streams: int) -> Tensor:
        """Logits of the parts."""
        logits = torch.full((streams,), -math.log(4 * streams - 5))
        logits[self.read] = math.log(3)
        return logits

    def __call__(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        streams = shape[0]
        return torch.cat([self.pre(streams)[:, None], FAR * (1 - torch.eye(streams))], dim=1)


class ManifoldHyper(Connection):
    """With the streams S [N, D] of a token, p = sigmoid(.), R doubly stochastic, b = 2 sigmoid(.): branch input p^T S,
    and S <- R^T S + b F(p^T S)^T. Every logit is a static one plus a scale times one that depends on the token."""

    reads = stream = ("streams",)
    static_alpha: nn.Parameter
    static_beta: nn.Parameter
    dynamic_alpha: nn.Parameter
    dynamic_beta: nn.Parameter
    pre_scale: nn.Parameter
    mix_scale: nn.Parameter
    post_scale: nn.Parameter

    def __init__(self, config: ManifoldConfig, d_model: int, width: int, columns: tuple[int, int]) -> None:
        """width: of what logits are computed from. columns: how many alpha and beta take."""
        super().__init__()
        self.streams = config.streams
        self.writes = (Entry("streams", (config.streams, d_model)),)
        self.mix = StreamMix()
        self.norm = OffsetRMSNorm(width, config.norm_eps)
        declare(self, "static_beta", (self.streams,), Constant(0.0), decay=False)
        declare(self, "dynamic_alpha", (width, columns[0]), Constant(0.0), role="gate")
        declare(self, "dynamic_beta", (width, columns[1]), Constant(0.0), role="gate")
        for name in ("pre_scale", "mix_scale", "post_scale"):
            declare(self, name, (1,), Constant(0.01))

    def dynamic(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """rows: [B, T, ..., width]. Returns the columns of alpha and of beta, in at least float32."""
        columns = torch.cat([self.dynamic_alpha, self.dynamic_beta], dim=1)
        alpha, beta = self.norm(rows, columns).tensor_split([self.dynamic_alpha.shape[1]], dim=-1)
        return alpha, beta

    def matrices(self, streams_BTND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns p [B, T, N], R [B, T, N, M] and b [B, T, N], in at least float32."""
        raise NotImplementedError

    def alpha_scale(self, pre: int, mix: int) -> Tensor:
        """[pre + mix], for all of alpha at once: of a parameter whose parts go different ways, schedules that split the
        backward pass would walk the way that they share twice."""
        return torch.cat([self.pre_scale.expand(pre), self.mix_scale.expand(mix)])

    def post(self, beta_BTN: Tensor) -> Tensor:
        return 2 * torch.addcmul(self.static_beta, beta_BTN, self.post_scale).sigmoid()

    def read(self, state: State) -> tuple[Views, State]:
        streams_BTND = state["streams"]
        pre, mix, beta = self.matrices(streams_BTND)
        # R - I and not R: near the identity, bfloat16 would leave rows that no longer sum to 1.
        moves = mix - torch.eye(self.streams, dtype=mix.dtype, device=mix.device)
        kept = {"moves": moves.to(streams_BTND.dtype), "beta": beta.to(streams_BTND.dtype)}
        x_BT1D = self.mix(streams_BTND, pre.to(streams_BTND.dtype)[..., None])
        return Views.same(x_BT1D.squeeze(-2)), kept

    def write(self, state: State, kept: State, out_BTD: Tensor) -> State:
        # Mixed here, not in `read`, so that one set of streams and not two lives while the branch runs.
        mixed_BTND = self.mix(state["streams"], kept["moves"], out_BTD[..., None, :], kept["beta"][..., None, :], True)
        return {**state, "streams": mixed_BTND}

    def peek(self, state: State) -> Tensor:
        """The mean over the streams, which mixing leaves alone."""
        return state["streams"].mean(-2)

    def add(self, state: State, x_BTD: Tensor) -> State:
        return {**state, "streams": state["streams"] + x_BTD[..., None, :]}

    def flops_per_token(self, d_model: int) -> float:
        return stream_sums(self.streams, d_model)


class SinkhornHyper(ManifoldHyper):
    """R by Sinkhorn-Knopp from the logits alpha[:, 1:]; p from alpha[:, 0]."""

    def __init__(
        self, config: ManifoldHyperConnections, d_model: int, index: int, width: int, columns: tuple[int, int]
    ) -> None:
        super().__init__(config, d_model, width, columns)
        self.iterations, self.sinkhorn = config.iterations, Sinkhorn()
        streams = config.streams
        declare(self, "static_alpha", (streams, 1 + streams), OneStreamReads(index % streams), decay=False)

    def logits(self, streams_BTND: Tensor) -> tuple[Tensor, Tensor]:
        """What depends on the token of alpha [B, T, N, 1 + N] and beta [B, T, N], before their scales."""
        raise NotImplementedError

    def matrices(self, streams_BTND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        alpha, beta = self.logits(streams_BTND)
        alpha = torch.addcmul(self.static_alpha, alpha, self.alpha_scale(1, self.streams))
        return alpha[..., 0].sigmoid(), self.sinkhorn(alpha[..., 1:], self.iterations), self.post(beta)


class FlatHyper(SinkhornHyper):
    """All logits from all streams: norm(S as one vector [N D]) W."""

    def __init__(self, config: ManifoldHyperConnections, d_model: int, index: int) -> None:
        n = config.streams
        super().__init__(config, d_model, index, n * d_model, (n * (1 + n), n))

    def logits(self, streams_BTND: Tensor) -> tuple[Tensor, Tensor]:
        alpha, beta = self.dynamic(streams_BTND.flatten(-2))
        return alpha.unflatten(-1, (self.streams, -1)), beta
