"""Residuals whose layers can each be taught by itself to go where a plain model goes.

Shape suffixes: B batch, T sequence, D model width.
"""

import abc

from torch import Tensor

from models.state import State


class Following(abc.ABC):
    """A residual whose state is as good as two successive inputs of plain layers, of which entry "x" is the later."""

    @abc.abstractmethod
    def standing(self, x_BTD: Tensor, previous_BTD: Tensor) -> State:
        """The state before layer l of a model that follows a plain one, whose layers l and l-1 are given x and
        `previous` (x itself before the first layer). [B, T, D] each."""
