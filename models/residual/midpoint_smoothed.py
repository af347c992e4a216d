"""The midpoint residual read through the mean of its last pair: what plain weights are converted to at the least loss.

Shape suffixes: B batch, T sequence, D model width.
"""

import dataclasses
from types import MappingProxyType

from torch import Tensor

from models.residual.midpoint import MidpointCloser, TwoStepResidual
from models.slots import Closer
from models.state import State


@dataclasses.dataclass(frozen=True)
class SmoothedMidpointResidual(TwoStepResidual, kind="midpoint_smoothed"):
    """`midpoint` whose final norm reads (p_L + p_{L-1}) / 2, as Gragg smooths the rule (Hairer, Norsett and Wanner,
    Solving Ordinary Differential Equations I, II.9). The first step too is of twice `step`, from p_{-1} = p_0: the
    pair's mean then goes m_{l+1} = m_l + step f_l(p_l), which at step 1 is the plain residual to first order in f.

    step, grid_bits: as of `midpoint`.
    """

    converted = MappingProxyType({"step": 0.5})

    def close(self, d_model: int, num_layers: int) -> Closer:
        return PairCloser()


class PairCloser(MidpointCloser):
    """(p_L + p_{L-1}) / 2."""

    def forward(self, state: State) -> Tensor:
        return (state["x"] + state["previous"]) / 2
