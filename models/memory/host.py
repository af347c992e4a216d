"""Host memory as a place for tensors to wait in: copies there and back beside the computation."""

import torch
from torch import Tensor


class Host:
    """Copies of a device's tensors. On a CPU, whose memory it is anyway, it copies too: one path to prove."""

    def out(self, x: Tensor) -> Tensor:
        """What waits in host memory for x, which may be freed."""
        return x.clone()

    def refill(self, waiting: Tensor, x: Tensor) -> None:
        """Have x, which came `back`, wait where it waited before."""
        waiting.copy_(x)

    def back(self, waiting: Tensor) -> Tensor:
        """On the device again, once a `mark` behind it has been waited for."""
        return waiting.clone()

    def mark(self) -> object:
        """The copies so far."""
        return None

    def arrive(self, mark: object) -> None:
        """Have the computation wait for the copies before the mark, and for none behind it."""

    def settle(self) -> None:
        """Wait for all copies so far, so that this process may read what waits."""


class PinnedHost(Host):
    """Of a CUDA device: copies run on a stream of their own, in the order of the calls, and nobody waits for them but
    the computation that uses what comes back."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)

    def out(self, x: Tensor) -> Tensor:
        waiting = torch.empty_like(x, device="cpu", pin_memory=True)
        self.refill(waiting, x)
        x.record_stream(self.stream)
        return waiting

    def refill(self, waiting: Tensor, x: Tensor) -> None:
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            waiting.copy_(x, non_blocking=True)

    def back(self, waiting: Tensor) -> Tensor:
        # Made of the copies' memory. What is freed of it is used again by a later copy alone, which follows the copies
        # before it and waits for all that the computation has been given by then: nobody need hold it for longer.
        with torch.cuda.stream(self.stream):
            x = torch.empty_like(waiting, device=self.device)
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            x.copy_(waiting, non_blocking=True)
        return x

    def mark(self) -> torch.cuda.Event:
        mark = torch.cuda.Event()
        mark.record(self.stream)
        return mark

    def arrive(self, mark: object) -> None:
        assert isinstance(mark, torch.cuda.Event)
        torch.cuda.current_stream(self.device).wait_event(mark)

    def settle(self) -> None:
        self.stream.synchronize()


def host_of(device: torch.device) -> Host:
    return PinnedHost(device) if device.type == "cuda" else Host()
