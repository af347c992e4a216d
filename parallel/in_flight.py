"""Collectives that are under way while something else is computed.

Launching and waiting are nodes of their own in autograd's graph: the backward pass launches the adjoint where the
forward pass waited, and waits where that launched. Autograd takes the node first that was made last, so what was
computed in between is computed in between again.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

# The tensor that a collective fills, and the work to wait for.
Started = tuple[Tensor, dist.Work | None]
Start = Callable[[Tensor], Started]


class Flight:
    """A tensor under way. there: how it is sent. back: how its gradient is."""

    def __init__(self, x: Tensor, there: Start, back: Start) -> None:
        self._there, self._back = there, back
        self._under_way: tuple[Tensor, Tensor, dist.Work] | None = None
        self.carrier: Tensor | None = Launch.apply(x, self)

    @torch.compiler.disable()
    def wait(self, carrier: Tensor | None = None) -> Tensor:
        """What has arrived; to be asked for once. carrier: what the flight's has become on its way, in autograd's
        graph."""
        # Kept, the carrier would keep its node, which keeps this: a cycle through autograd's own memory, which Python
        # collects late or never.
        own, self.carrier = self.carrier, None
        return Wait.apply(own if carrier is None else carrier, self)

    def forth(self, x: Tensor) -> None:
        self._launch(x, self._there)

    def back(self, gradient: Tensor) -> Tensor:
        """The gradient of what was sent, which is not there before it has landed."""
        return self._launch(gradient, self._back)

    def _launch(self, x: Tensor, start: Start) -> Tensor:
        out, work = start(x)
        assert work is not None, "only a rank of the group launches"
        # With what is sent, which must not be freed before.
        self._under_way = (x, out, work)
        return out

    def land(self) -> Tensor:
        assert self._under_way is not None, "nothing is under way"
        _, out, work = self._under_way
        self._under_way = None
        work.wait()
        return out


class Launch(Function):
    """Returns a tensor of the shape of x, for the sake of its gradient: what arrives may have another."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, flight: Flight) -> Tensor:
        ctx.flight = flight
        flight.forth(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return ctx.flight.land(), None


class Wait(Function):
    @staticmethod
    def forward(ctx: Any, carrier: Tensor, flight: Flight) -> Tensor:
        ctx.flight = flight
        return flight.land()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return ctx.flight.back(grad), None
