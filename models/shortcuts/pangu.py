"""The augmented shortcut of PanGu-pi: a small non-linear path beside attention (Wang et al., arXiv 2312.17276).

    Aug(u) = Mixer(u) + W_up GELU(W_down u)    beside the identity

Shape suffixes: B batch, T sequence, D model width.
"""

import dataclasses
from types import MappingProxyType
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from models.context import LayerContext
from models.limits import at_least
from models.params import Constant, FanIn, Linear
from models.slots import Beside, ShortcutConfig
from models.state import State


@dataclasses.dataclass(frozen=True)
class PanGuShortcut(ShortcutConfig, kind="pangu"):
    """One augmented shortcut beside every mixer, of what the mixer reads; FFNs have none. W_up starts at 0.

    reduction: d_model over the width of the bottleneck, 32 in the paper.
    """

    reduction: int = 32

    active = False
    example = MappingProxyType({"reduction": 4})

    def __post_init__(self) -> None:
        at_least(self, 1, "reduction")

    def build(self, ctx: LayerContext) -> nn.Module:
        return nn.Identity()

    def beside(self, ctx: LayerContext, branch: Literal["mixer", "ffn"], path: nn.Module) -> Beside:
        if ctx.d_model % self.reduction:
            raise ValueError(
                f"shortcut.reduction {self.reduction} does not divide d_model {ctx.d_model}, and the bottleneck is the "
                "quotient of the two; change one"
            )
        return Augmented(ctx.d_model, ctx.d_model // self.reduction) if branch == "mixer" else Beside()


class Augmented(Beside):
    def __init__(self, d_model: int, width: int) -> None:
        super().__init__()
        self.down = Linear(d_model, width, init=FanIn(d_model))
        self.up = Linear(width, d_model, init=Constant(0.0))

    def forward(self, x_BTD: Tensor | None, view_BTD: Tensor, out_BTD: Tensor, inputs: State) -> tuple[Tensor, State]:
        return out_BTD + self.up(F.gelu(self.down(view_BTD))), {}
