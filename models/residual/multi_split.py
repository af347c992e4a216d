"""Multi-split reversible coupling: n streams, each of which is changed in turn by a function of all others.

Shape suffixes: B batch, T sequence, D model width.
"""

import dataclasses
from typing import Literal

from torch import nn

from models.context import LayerContext
from models.residual.fixed_point import CopiesOnGrid, GridConfig
from models.residual.reversible import Coupling, MeanCloser
from models.slots import Closer, Connection, Opener

MOST = 64


@dataclasses.dataclass(frozen=True)
class MultiSplitResidual(GridConfig, kind="multi_split"):
    """x_k <- x_k + G_k(max over i != k of x_i), the maximum of each element (DARTSformer, arXiv 2105.14669). The
    branches of all layers, mixer and FFN in turn, are G_1, ..., G_n, G_1 and so on, over full-width copies of the
    embedding; the final norm reads the streams' mean. Two streams are `reversible`.

    streams: n; of the paper's decoders 3 were best.
    """

    streams: int = 3

    steps = (("mixer",), ("ffn",))

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 2 <= self.streams <= MOST:
            raise ValueError(
                f"streams is {self.streams}; it must lie between 2 and {MOST}, as each is a copy as wide as the model"
            )

    def names(self) -> tuple[str, ...]:
        return tuple(f"x{number}" for number in range(1, self.streams + 1))

    def connect(self, ctx: LayerContext, branch: Literal["mixer", "ffn"], shortcut: nn.Module) -> Connection:
        names = self.names()
        return Coupling(ctx.d_model, names, names[ctx.sublayer(branch) % self.streams], self.grid_bits)

    def open(self, d_model: int) -> Opener:
        return CopiesOnGrid(d_model, self.grid_bits, self.names())

    def close(self, d_model: int, num_layers: int) -> Closer:
        return MeanCloser(self.names())
