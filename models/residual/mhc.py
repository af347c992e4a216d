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
from models.kernels.handover.reading import Reading
from models.kernels.sinkhorn import Sinkhorn
from models.limits import above_zero, at_least
from models.params import Constant, declare
from models.residual.stream_norm import OffsetRMSNorm
from models.residual.streams import StreamCloser, StreamOpener, Streams
from models.slots import Closer, Connection, Opener, ResidualConfig

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


class ManifoldHyper(Streams):
    """a = p = sigmoid(.), m = R doubly stochastic, b = 2 sigmoid(.). Every logit is a static one plus a scale times one
    that depends on the token."""

    # R - I and not R: near the identity, bfloat16 would leave rows that no longer sum to 1.
    moves = True
    static_alpha: nn.Parameter
    static_beta: nn.Parameter
    dynamic_alpha: nn.Parameter
    dynamic_beta: nn.Parameter
    pre_scale: nn.Parameter
    mix_scale: nn.Parameter
    post_scale: nn.Parameter

    def __init__(self, config: ManifoldConfig, d_model: int, width: int, columns: tuple[int, int]) -> None:
        """width: of what logits are computed from. columns: how many alpha and beta take."""
        super().__init__(config.streams, d_model)
        self.norm = OffsetRMSNorm(width, config.norm_eps)
        declare(self, "static_beta", (self.streams,), Constant(0.0), decay=False)
        declare(self, "dynamic_alpha", (width, columns[0]), Constant(0.0), role="gate")
        declare(self, "dynamic_beta", (width, columns[1]), Constant(0.0), role="gate")
        for name in ("pre_scale", "mix_scale", "post_scale"):
            declare(self, name, (1,), Constant(0.01))

    def logits_of_read(self) -> tuple[Tensor, int, bool]:
        """Of `Reading`: the static parts, the stride, and whether it is flat."""
        raise NotImplementedError

    def reading(self) -> Reading:
        columns = torch.cat([self.dynamic_alpha, self.dynamic_beta], dim=1)
        static_N1, stride, flat = self.logits_of_read()
        return Reading(*self.norm.operands(columns), static_N1, self.pre_scale, "sigmoid", stride, flat)

    def matrices(self, alpha: Tensor) -> tuple[Tensor, Tensor]:
        """alpha: what depends on the token of their logits, before its scales. Returns p [B, T, N] and R [B, T, N, M],
        in at least float32."""
        raise NotImplementedError

    def settle(self, logits: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        assert logits is not None
        alpha, beta = logits.tensor_split([self.dynamic_alpha.shape[1]], dim=-1)
        pre, mix = self.matrices(alpha)
        moved = mix - torch.eye(self.streams, dtype=mix.dtype, device=mix.device)
        return pre[..., None], moved, self.post(beta)[..., None, :]

    def alpha_scale(self, pre: int, mix: int) -> Tensor:
        """[pre + mix], for all of alpha at once: of a parameter whose parts go different ways, schedules that split the
        backward pass would walk the way that they share twice."""
        return torch.cat([self.pre_scale.expand(pre), self.mix_scale.expand(mix)])

    def post(self, beta: Tensor) -> Tensor:
        """b [B, T, N] from what depends on the token of its logits, which are the last dimensions."""
        beta_BTN = beta.reshape(*beta.shape[:2], self.streams)
        return 2 * torch.addcmul(self.static_beta, beta_BTN, self.post_scale).sigmoid()


class SinkhornHyper(ManifoldHyper):
    """R by Sinkhorn-Knopp from the logits alpha[:, 1:]; p from alpha[:, 0]."""

    def __init__(
        self, config: ManifoldHyperConnections, d_model: int, index: int, width: int, columns: tuple[int, int]
    ) -> None:
        super().__init__(config, d_model, width, columns)
        self.iterations, self.sinkhorn = config.iterations, Sinkhorn()
        streams = config.streams
        declare(self, "static_alpha", (streams, 1 + streams), OneStreamReads(index % streams), decay=False)

    def matrices(self, alpha: Tensor) -> tuple[Tensor, Tensor]:
        alpha = alpha.reshape(*alpha.shape[:2], self.streams, 1 + self.streams)
        alpha = torch.addcmul(self.static_alpha, alpha, self.alpha_scale(1, self.streams))
        return alpha[..., 0].sigmoid(), self.sinkhorn(alpha[..., 1:], self.iterations)


class FlatHyper(SinkhornHyper):
    """All logits from all streams: norm(S as one vector [N D]) W."""

    def __init__(self, config: ManifoldHyperConnections, d_model: int, index: int) -> None:
        n = config.streams
        super().__init__(config, d_model, index, n * d_model, (n * (1 + n), n))

    def logits_of_read(self) -> tuple[Tensor, int, bool]:
        return self.static_alpha[:, :1], 1 + self.streams, True
