"""Bounds that gates stay above, learned for all layers together: HGRN's and HGRN2's.

Shape suffixes: B batch, T sequence, H heads, K channels of a head, L layers that share bounds.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.context import LayerContext
from models.params import Axis, Constant, declare, upcast


class LowerBounds(nn.Module):
    """The bounds of all layers of a shape: layer l's is the sum of softmax over layers, up to l and without the
    first (Qin et al., arXiv 2311.04823)."""

    table: nn.Parameter

    def __init__(self, layers: int, heads: int, key: int) -> None:
        super().__init__()
        axes = (None, Axis("heads", heads), None)
        declare(self, "table", (layers, heads, key), Constant(0.0), axes, decay=False, role="gate", wide=False)

    def forward(self, index: int) -> Tensor:
        """[H, K] of the layer that is the index-th of them."""
        return upcast(self.table).softmax(0)[1 : index + 1].sum(0)


def share_bounds(ctx: LayerContext, heads: int, key: int) -> tuple[LowerBounds, int]:
    """The bounds of all layers whose mixer is configured like this one's, and which of them this one is."""
    mixer = ctx.layers[ctx.index].mixer
    alike = [index for index, layer in enumerate(ctx.layers) if layer.mixer == mixer]
    bounds = ctx.share(f"bounds of {mixer}", lambda: LowerBounds(len(alike), heads, key))
    return bounds, alike.index(ctx.index)


def forgetting(gate_BTHK: Tensor, bound_HK: Tensor | None) -> tuple[Tensor, Tensor]:
    """(1 - a, log a) with a = bound + (1 - bound) sigmoid(gate), at least float32."""
    gate = upcast(gate_BTHK)
    if bound_HK is None:
        return (-gate).sigmoid(), F.logsigmoid(gate)
    bound = upcast(bound_HK)
    least = torch.finfo(bound.dtype).tiny  # whose logarithm adds nothing, where that of 0 has no gradient
    log_decay = torch.logaddexp(F.logsigmoid(gate) + torch.log1p(-bound), bound.clamp_min(least).log())
    return (1 - bound) * (-gate).sigmoid(), log_decay
