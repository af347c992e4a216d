"""Softmax attention that can look at nothing: its weights are stretched and clipped (arXiv 2306.12929)."""

import dataclasses

from torch import Tensor

from models.context import LayerContext
from models.kernels.attention import Attend
from models.kernels.attention.by_blocks import ClippedSoftmax
from models.mixers.attention import Attention, AttentionConfig
from models.slots import Mixer


@dataclasses.dataclass(frozen=True)
class ClippedSoftmaxConfig(AttentionConfig, kind="clipped_softmax"):
    """Attention whose weights are clip((zeta - gamma) softmax + gamma, 0, 1) (Bondarenko et al., arXiv 2306.12929).

    gamma: 0 or less; a weight of less than -gamma / (zeta - gamma) becomes 0. The paper sets -alpha / T with alpha
    about 12 for OPT at sequence length T. zeta: 1 or more. The rest is as in attention.
    """

    gamma: float = -0.025
    zeta: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not -1 < self.gamma <= 0:
            raise ValueError(
                f"gamma is {self.gamma}; it must lie in (-1, 0], because a hidden token's weight is clipped to 0"
            )
        if not 1 <= self.zeta < 2:
            raise ValueError(f"zeta is {self.zeta}; it must lie in [1, 2), and 1 leaves weights near 1 alone")

    def build(self, ctx: LayerContext) -> Mixer:
        return ClippedAttention(self, ctx, self.built_head_dim(ctx.d_model))


class ClippedAttention(Attention):
    in_place = False  # a weight is clipped once the sum over all keys is known
    config: ClippedSoftmaxConfig

    def __init__(self, config: ClippedSoftmaxConfig, ctx: LayerContext, head_dim: int) -> None:
        super().__init__(config, ctx, head_dim)
        self.softmax = None

    def reading(self, heads: dict[str, Tensor], weights: dict[str, Tensor]) -> Attend:
        return ClippedSoftmax(self.config.gamma, self.config.zeta)
