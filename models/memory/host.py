"""Host memory as a place for tensors to wait in: copies there and back beside the computation."""

import torch
from torch import Tensor


class Host:
    """Copies of a device's tensors. On a CPU, whose memory it is anyway, it copies too: one path to prove."""

    def out(self, x: Tensor) -> Tensor:
        """What waits in host memory for x, which may be freed."""
        return x.clone()

    def back(self, waiting: Tensor) -> Tensor:
        """On the device again, once `arrived` has been called."""
        return waiting.clone()

    def arrived(self, x: Tensor) -> Tensor:
        """x, from `back`, for the computation to use."""
        return x


class PinnedHost(Host):
    """Of a CUDA device: copies run on a stream of their own, in the order of the calls, and nobody waits for them but
    the computation that uses what comes back."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)

    def out(self, x: Tensor) -> Tensor:
        waiting = torch.empty_like(x, device="cpu", pin_memory=True)
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            waiting.copy_(x, non_blocking=True)
        x.record_stream(self.stream)
        return waiting

    def back(self, waiting: Tensor) -> Tensor:
        # The pool that it takes memory from is the computation's, which may still use what is given out again.
        x = torch.empty_like(waiting, device=self.device)
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            x.copy_(waiting, non_blocking=True)
        x.record_stream(self.stream)
        return x

    def arrived(self, x: Tensor) -> Tensor:
        torch.cuda.current_stream(self.device).wait_stream(self.stream)
        return x


def host_of(device: torch.device) -> Host:
    return PinnedHost(device) if device.type == "cuda" else Host()
