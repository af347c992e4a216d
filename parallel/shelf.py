"""What an earlier pipeline stage of a rank keeps for a later one, and its gradients on the way back.

In the backward pass the later stage comes first, so that a gradient is there when the earlier one asks for it.
"""

from collections import deque
from typing import Any

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable


class Slot:
    """What is kept of one micro-batch. gradients: None until the later stage's backward pass, and where it has none."""

    def __init__(self, values: tuple[Tensor, ...]) -> None:
        self.values = values
        self.gradients: tuple[Tensor | None, ...] = (None,) * len(values)


class Shelf:
    """First in, first out: every stage of a schedule takes the micro-batches in the same order."""

    def __init__(self) -> None:
        self._slots: deque[Slot] = deque()

    def clear(self) -> None:
        """Forget what a step that ended early has left."""
        self._slots.clear()

    def keep(self, carrier: Tensor, values: tuple[Tensor, ...]) -> Tensor:
        """Keep `values`. Returns `carrier`, an output of the stage, whose gradient brings theirs along."""
        # What a stage was sent lies in a buffer that the next micro-batch may be received into.
        self._slots.append(slot := Slot(tuple(value.detach().clone() for value in values)))
        return Keep.apply(slot, carrier, *values)

    def take(self, carrier: Tensor) -> tuple[Tensor, ...]:
        """What was kept of the micro-batch whose turn it is. carrier: an input of the stage, to whose gradient the way
        of theirs leads."""
        return Take.apply(self._slots.popleft(), carrier)


class Keep(Function):
    @staticmethod
    def forward(ctx: Any, slot: Slot, carrier: Tensor, *values: Tensor) -> Tensor:
        ctx.slot = slot
        return carrier.view_as(carrier)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return None, gradient, *ctx.slot.gradients


class Take(Function):
    @staticmethod
    def forward(ctx: Any, slot: Slot, carrier: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.slot, values = slot, slot.values
        slot.values = ()
        return values

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *gradients: Tensor | None
    ) -> tuple[None, None]:
        ctx.slot.gradients = gradients
        return None, None
