"""Host memory as a place for tensors to wait in: copies there and back beside the computation."""

import torch
from torch import Tensor


class Host:
    """Copies of a device's tensors. On a CPU, whose memory it is anyway, it copies too: one path to prove."""

    def out(self, x: Tensor) -> Tensor:
        """What waits in host memory for x, which may be freed."""
        return x.clone()

    def refill(self, waiting: Tensor, x: Tensor) -> None:
        """Have x wait where `out` put another. x must not be freed before the next `arrive`."""
        waiting.copy_(x)

    def back(self, waiting: Tensor) -> Tensor:
        """On the device again, once `arrive` has been called."""
        return waiting.clone()

    def arrive(self) -> None:
        """Have the computation wait for all copies so far."""

    def settle(self) -> None:
        """Wait for all copies so far, so that this process may read what waits."""


class PinnedHost(Host):
    """Of a CUDA device: copies run on a stream of their own, in the order of the calls, and nobody waits for them but
    the computation that uses what comes back."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)
        self._coming: list[Tensor] = []

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
        # Its memory is the computation's, which may still use what is given out again. It is held until the computation
        # has waited for the copy; record_stream would keep the memory from being used again for longer, while
        # this process is ahead of the device.
        x = torch.empty_like(waiting, device=self.device)
        self._coming.append(x)
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            x.copy_(waiting, non_blocking=True)
        return x

    def arrive(self) -> None:
        torch.cuda.current_stream(self.device).wait_stream(self.stream)
        self._coming.clear()

    def settle(self) -> None:
        self.stream.synchronize()


def host_of(device: torch.device) -> Host:
    return PinnedHost(device) if device.type == "cuda" else Host()
