"""In which order collectives begin and end, and what computes between them."""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from parallel.in_flight import Flight

LAUNCH, LAND, COMPUTE = "launch", "land", "compute"


class Computed(torch.autograd.Function):
    """Notes that something computed x, and when its backward pass begins."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, seen: list[str]) -> Tensor:
        seen.append(COMPUTE)
        ctx.seen = seen
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        ctx.seen.append(COMPUTE)
        return grad, None


@contextlib.contextmanager
def flights(seen: list[str]) -> Iterator[None]:
    """Note what is launched and landed within."""
    launch, land = Flight._launch, Flight.land
    with (
        mock.patch.object(Flight, "_launch", lambda flight, *args: (seen.append(LAUNCH), launch(flight, *args))[1]),
        mock.patch.object(Flight, "land", lambda flight: (seen.append(LAND), land(flight))[1]),
    ):
        yield


def beside(seen: list[str]) -> list[int]:
    """How many collectives were under way at each computation. All must have landed at the end."""
    under_way, found = 0, []
    for what in seen:
        under_way += {LAUNCH: 1, LAND: -1, COMPUTE: 0}[what]
        if what == COMPUTE:
            found.append(under_way)
    assert under_way == 0, seen
    return found
