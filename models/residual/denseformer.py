"""DenseFormer: after every layer, a learned weighted average of all outputs so far.

Shape suffixes: B batch, T sequence, D model width, J sources.
"""

import dataclasses
from typing import Literal

from torch import Tensor, nn

from models.context import LayerContext
from models.kernels.depth_mix import DepthMix
from models.params import declare
from models.residual.past import LayerEnd, Newest, PastOpener, Selection, past
from models.slots import Closer, Connection, Opener, ResidualConfig
from models.state import Entry, State, Views


@dataclasses.dataclass(frozen=True)
class DenseFormer(ResidualConfig, kind="denseformer"):
    """Depth-weighted averages (Pagliardini et al., arXiv 2402.02622): layer i reads Y_i = sum_j a_ij X_j over the
    embedding X_0 and the outputs X_j of the layers before it. Starts as the plain residual.

    dilation: Y_i looks at every dilation-th output, X_j with j = i mod dilation. period: averages stand after every
    period-th layer. 4 and 5 are the paper's choice for speed.
    """

    dilation: int = 1
    period: int = 1

    starts_plain = True

    def __post_init__(self) -> None:
        self.selection()

    def selection(self) -> Selection:
        """Raises ValueError for values that select nothing."""
        return Selection(self.dilation, self.period)

    def connect(self, ctx: LayerContext, branch: Literal["mixer", "ffn"], shortcut: nn.Module) -> Connection:
        if branch == "ffn":
            return LayerEnd(ctx, shortcut)
        return DepthAverageStart(ctx, self.selection(), shortcut)

    def open(self, d_model: int) -> Opener:
        return PastOpener(d_model)

    def close(self, d_model: int, num_layers: int) -> Closer:
        return DepthAverageCloser(DepthAverage(num_layers, self.selection()))


class DepthAverage(nn.Module):
    """Y_i from the outputs so far; the newest output itself where there is no average."""

    weight: nn.Parameter

    def __init__(self, index: int, selection: Selection) -> None:
        super().__init__()
        self.averages = selection.mixes(index)
        self.reads = tuple(past(j) for j in selection.sources(index)) if self.averages else (past(index),)
        if self.averages:
            # Without decay, which would shrink the identity path itself.
            declare(self, "weight", (len(self.reads),), Newest(), decay=False)
            self.depth_mix = DepthMix()

    def forward(self, state: State) -> Tensor:
        sources = [state[name] for name in self.reads]
        return self.depth_mix(sources, self.weight[None])[0] if self.averages else sources[0]

    def flops_per_token(self, d_model: int) -> float:
        return 2 * len(self.reads) * d_model if self.averages else 0


class DepthAverageStart(Connection):
    """A mixer's connection: it reads the average, to which the layer adds."""

    def __init__(self, ctx: LayerContext, selection: Selection, shortcut: nn.Module) -> None:
        super().__init__()
        self.average, self.shortcut = DepthAverage(ctx.index, selection), shortcut
        self.reads = self.average.reads
        self.writes = (Entry("x", (ctx.d_model,)),)
        self.stream = self.reads[-1:]

    def read(self, state: State) -> tuple[Views, State]:
        y_BTD = self.average(state)
        return Views.same(y_BTD), {"stream": y_BTD}

    def write(self, state: State, kept: State, out_BTD: Tensor) -> State:
        return {**state, "x": self.shortcut(kept["stream"]) + out_BTD}

    def peek(self, state: State) -> Tensor:
        """The newest output: the average is made when the mixer reads."""
        return state[self.reads[-1]]

    def add(self, state: State, x_BTD: Tensor) -> State:
        return {**state, self.reads[-1]: state[self.reads[-1]] + x_BTD}

    def flops_per_token(self, d_model: int) -> float:
        return self.average.flops_per_token(d_model)


class DepthAverageCloser(Closer):
    """The last average goes to the final norm."""

    def __init__(self, average: DepthAverage) -> None:
        super().__init__()
        self.average = average
        self.reads = average.reads

    def forward(self, state: State) -> Tensor:
        return self.average(state)

    def flops_per_token(self, d_model: int) -> float:
        return self.average.flops_per_token(d_model)
