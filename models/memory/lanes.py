"""Two streams of a device that work takes turns on, so that what depends on the turn before alone overlaps the rest."""

import contextlib
from collections.abc import Iterable
from contextlib import AbstractContextManager

import torch
from torch import Tensor


class Lanes:
    """On a CPU one turn follows another."""

    def turn(self, needed: Iterable[Tensor], first: bool) -> AbstractContextManager[object]:
        """Around the work of a turn. needed: tensors from elsewhere. first: they come from no earlier turn."""
        return contextlib.nullcontext()

    def hand_over(self, made: Iterable[Tensor]) -> None:
        """Tensors that turns made, to what runs outside of them."""


class CudaLanes(Lanes):
    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.lanes = (torch.cuda.Stream(device), torch.cuda.Stream(device))
        self.turns = 0
        self.done = torch.cuda.Event()

    @contextlib.contextmanager
    def turn(self, needed: Iterable[Tensor], first: bool):
        lane = self.lanes[self.turns % 2]
        self.turns += 1
        if first:
            lane.wait_stream(torch.cuda.current_stream(self.device))
        else:
            lane.wait_event(self.done)  # of the other lane, without the work behind that turn
        for x in needed:
            x.record_stream(lane)
        with torch.cuda.stream(lane):
            yield
            self.done = lane.record_event()

    def hand_over(self, made: Iterable[Tensor]) -> None:
        stream = torch.cuda.current_stream(self.device)
        for x in made:
            x.record_stream(stream)


def lanes_of(device: torch.device) -> Lanes:
    return CudaLanes(device) if device.type == "cuda" else Lanes()
