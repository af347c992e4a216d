"""Universal Transformer: one block of layers, run several times over (Dehghani et al., arXiv 1807.03819).

    H_t = Block(H_{t-1} + P_t),    P_t[i, 2j] = sin(i / 10000^(2j/D)) + sin(t / 10000^(2j/D)),    2j+1: cos

i is the position and t = 1 .. steps. Shape suffixes: B batch, T sequence, D model width.
"""

import dataclasses

import torch
from torch import Tensor

from models.context import LayerContext
from models.depth.base import DepthConfig, DepthControl, Gated
from models.depth.full import Full
from models.limits import at_least
from models.params import upcast
from models.rope import angles
from models.state import Side, State

WAVELENGTH = 10000.0


@dataclasses.dataclass(frozen=True)
class UniversalDepth(DepthConfig, kind="universal"):
    """All layers at the same place of the block are one layer: mixer, FFN, norms and branch scalings.

    block: its number of layers; null: as few as the pattern repeats. scale: of P; 1 is the paper's, for embeddings of
    variance 1 (norm peri makes them so), and 0 leaves P out.
    """

    block: int | None = None
    scale: float = 1.0

    def __post_init__(self) -> None:
        at_least(self, 0, "scale")
        if self.block is not None:
            at_least(self, 1, "block")

    def build(self, ctx: LayerContext) -> DepthControl:
        step, place = divmod(ctx.index, self.period(ctx.layers))
        return Full() if place or not self.scale else StepStart(step + 1, self.scale)

    def period(self, layers: tuple[object, ...]) -> int:
        """Raises ValueError where the layers are not one block, at least twice."""
        count = len(layers)
        fitting = [n for n in range(1, count) if count % n == 0 and layers[:n] * (count // n) == layers]
        if not fitting:
            raise ValueError(
                f"depth {self.kind} runs one block of layers several times, and the {count} layers of this model are "
                "no such repetition; write the block as pattern and the number of its runs, 2 or more, as repeat"
            )
        if self.block is not None and self.block not in fitting:
            raise ValueError(
                f"depth.block is {self.block}, and the {count} layers are not that many repeated; "
                f"use {' or '.join(map(str, fitting))}, or null"
            )
        return self.block or fitting[0]


def coordinates(positions_BT: Tensor, step: int, like_BTD: Tensor) -> Tensor:
    """P_t, [B, T, D], in the type of `like_BTD` or float32 if that is less."""
    width, dtype = like_BTD.shape[-1], upcast(like_BTD[:0]).dtype
    times_BT = torch.full_like(positions_BT[:1, :1], step)
    (cos, sin), (cos_t, sin_t) = (angles(x, width, WAVELENGTH, dtype) for x in (positions_BT, times_BT))
    return torch.stack([sin + sin_t, cos + cos_t], dim=-1).flatten(-3)[..., :width]


class StepStart(DepthControl):
    """The first layer of a step."""

    adds = True

    def __init__(self, step: int, scale: float) -> None:
        super().__init__()
        self.step, self.scale = step, scale

    def forward(self, peek_BTD: Tensor | None, inputs: State, side: Side) -> Gated:
        assert peek_BTD is not None
        added_BTD = self.scale * coordinates(side.positions_BT, self.step, peek_BTD)
        return Gated(added_BTD=added_BTD.to(peek_BTD.dtype))
