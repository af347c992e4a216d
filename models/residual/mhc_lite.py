"""mHC-lite: streams are mixed by a weighted average of all permutations, which is doubly stochastic as it stands.

Shape suffixes: B batch, T sequence, N streams (M where they are written), D model width, P permutations.
"""

import dataclasses
import math
from typing import Literal

import torch
from torch import Tensor, nn

from models.context import LayerContext
from models.params import declare
from models.residual.mhc import FAR, ManifoldConfig, ManifoldHyper, ManifoldHyperConnections, OneStreamReads
from models.slots import Connection

MOST_STREAMS = 6  # 720 permutations; 7 have 5040, more than a small model is wide


@dataclasses.dataclass(frozen=True)
class LiteManifoldHyperConnections(ManifoldConfig, kind="mhc_lite"):
    """mHC-lite (arXiv 2601.05732): R = sum_p softmax(logits)_p P_p over all permutation matrices P (Birkhoff), in the
    place of Sinkhorn-Knopp. Starts as the plain residual.

    streams: how many, up to 6, which have 720 permutations. norm_eps: as in mhc.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.streams > MOST_STREAMS:
            raise ValueError(
                f"streams is {self.streams}, and every permutation of them takes a weight; use at most {MOST_STREAMS}, "
                f"or residual {ManifoldHyperConnections.kind}"
            )

    def connect(self, ctx: LayerContext, branch: Literal["mixer", "ffn"], shortcut: nn.Module) -> Connection:
        return LiteHyper(self, ctx.d_model, ctx.sublayer(branch))


def permutations(streams: int, device: torch.device) -> Tensor:
    """[P, N]: all permutations of 0..N-1 in lexicographic order, made on the device from their numbers."""
    number_P = torch.arange(math.factorial(streams), device=device)
    left = torch.arange(streams, device=device).expand(len(number_P), -1)
    taken = []
    for size in range(streams, 0, -1):
        digit_P1 = (number_P // math.factorial(size - 1) % size)[:, None]
        taken.append(left.gather(1, digit_P1))
        others = torch.arange(size - 1, device=device).expand(len(number_P), -1)
        left = left.gather(1, others + (others >= digit_P1))
    return torch.cat(taken, dim=1)


@dataclasses.dataclass(frozen=True)
class IdentityStays:
    """[N + P]: the parts of the branch input as in mhc, then the logits of the permutations, the identity first."""

    read: int
    streams: int

    def __call__(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        others = torch.full((shape[0] - self.streams - 1,), FAR)
        return torch.cat([OneStreamReads(self.read).pre(self.streams), torch.zeros(1), others])


class LiteHyper(ManifoldHyper):
    """All logits from all streams, as in mhc: N for p, then one for each permutation."""

    def __init__(self, config: LiteManifoldHyperConnections, d_model: int, index: int) -> None:
        n = config.streams
        logits = n + math.factorial(n)
        super().__init__(config, d_model, n * d_model, (logits, n))
        declare(self, "static_alpha", (logits,), IdentityStays(index % n, n), decay=False)

    def logits_of_read(self) -> tuple[Tensor, int, bool]:
        return self.static_alpha[: self.streams, None], 1, True

    def matrices(self, alpha: Tensor) -> tuple[Tensor, Tensor]:
        n = self.streams
        alpha = torch.addcmul(self.static_alpha, alpha, self.alpha_scale(n, alpha.shape[-1] - n))
        weights_BTP = alpha[..., n:].softmax(-1)
        matrices_PNM = torch.eye(n, dtype=alpha.dtype, device=alpha.device)[permutations(n, alpha.device)]
        return alpha[..., :n].sigmoid(), (weights_BTP @ matrices_PNM.flatten(1)).unflatten(-1, (n, n))

    def flops_per_token(self, d_model: int) -> float:
        """With the average of the permutations."""
        average = 2 * math.factorial(self.streams) * self.streams**2
        return super().flops_per_token(d_model) + average
