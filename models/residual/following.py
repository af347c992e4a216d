"""Residuals whose layers can each be taught by itself to go where a plain model goes.

Shape suffixes: B batch, T sequence, D model width.
"""

import abc
from typing import ClassVar

from torch import Tensor

from models.state import State


class Following(abc.ABC):
    """A residual whose state is as good as two successive inputs of a plain model's steps, and each of whose `steps`
    replaces the earlier of the two. A plain model's steps are its layers where a layer of this residual is one step,
    and mixers and FFNs where it is two.

    pays: a conversion spends part of its steps on this lesson unless it is told how many.
    """

    pays: ClassVar[bool] = True

    @abc.abstractmethod
    def standing(self, x_BTD: Tensor, previous_BTD: Tensor) -> State:
        """The state before a layer of a model that follows a plain one, whose layer is given x, and whose step before
        that was given `previous` (x itself before the first). [B, T, D] each."""

    @abc.abstractmethod
    def reached(self, after: State) -> tuple[Tensor, ...]:
        """Where the layer's steps have come, in their order: [B, T, D] each, of the state after the layer."""

    def aims(self, targets: tuple[Tensor, ...], last: bool) -> tuple[Tensor, ...]:
        """Where the layer's steps should come when a plain model's come to `targets`, so that the final norm reads the
        same after the last layer."""
        return targets
