"""Slow links between ranks: collectives that are held back, or a network device of limited rate."""

import contextlib
import math
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch.distributed as dist
from torch import Tensor

# By what is sent, in halves of an all-reduce. Torch 2.13 renames two of them.
HALVES = {
    "all_gather": 1,
    "all_gather_single": 1,
    "all_gather_into_tensor": 1,
    "reduce_scatter_single": 1,
    "reduce_scatter_tensor": 1,
    "all_reduce": 2,
}
UNITS = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}


class Link:
    """As fast as it is.

    seconds: what the collectives of a step took by its speed alone, summed; at_once: of those waited for where they
    begin.
    """

    name = "free"

    def __init__(self) -> None:
        self.seconds, self.at_once = 0.0, 0.0

    def delay(self, sent: float, halves: int) -> float:
        """Of a collective that sends so many bytes from each rank."""
        return 0.0

    def hold(self, work: Any, until: float) -> Any:
        """The work of a collective under way, as its caller gets it. until: when it should be done."""
        return work

    def prepare(self) -> None:
        """On each rank, in front of a step."""

    def _watched(self, collective: Callable[..., Any], halves: int) -> Callable[..., Any]:
        def run(*args: Any, async_op: bool = False, **rest: Any) -> Any:
            whole = max(nbytes(arg) for arg in args)
            size = dist.get_world_size(rest["group"])
            began, delay = time.perf_counter(), self.delay(halves * whole * (size - 1) / size, halves)
            self.seconds += delay
            self.at_once += 0.0 if async_op else delay
            work = self.hold(collective(*args, async_op=async_op, **rest), began + delay)
            if work is not None and not async_op:
                work.wait()
            return work if async_op else None

        return run

    @contextlib.contextmanager
    def used(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for name, halves in HALVES.items():
                if hasattr(dist, name):
                    stack.enter_context(mock.patch.object(dist, name, self._watched(getattr(dist, name), halves)))
            yield


def nbytes(given: Tensor | list[Tensor]) -> int:
    return given.nbytes if isinstance(given, Tensor) else sum(x.nbytes for x in given)


class Late:
    """A collective's work that is done no sooner than `until`. work: None of one that has ended."""

    def __init__(self, work: Any, until: float) -> None:
        self.work, self.until = work, until

    def wait(self) -> None:
        if self.work is not None:
            self.work.wait()
        time.sleep(max(0.0, self.until - time.perf_counter()))


class Latency(Link):
    """Each half of an all-reduce ends `milliseconds` after it began, or later."""

    def __init__(self, milliseconds: float) -> None:
        super().__init__()
        self.name, self._seconds = f"{milliseconds:g} ms", milliseconds / 1000

    def delay(self, sent: float, halves: int) -> float:
        return halves * self._seconds

    def hold(self, work: Any, until: float) -> Any:
        return Late(work, until)


class Rate(Link):
    """A network device of this host sends no more than `rate`, as `tc tbf` (token bucket filter) has it. Takes root.

    Raises ValueError for a rate that tc would not know.
    """

    def __init__(self, rate: str, device: str) -> None:
        super().__init__()
        found = re.fullmatch(r"(\d+)([kmg]bit)", rate)
        if found is None:
            raise ValueError(f"the rate is {rate!r}; it must be a whole number and kbit, mbit or gbit, such as 500mbit")
        self.name, self._device, self._bytes_per_s = rate, device, int(found[1]) * UNITS[found[2]] / 8

    def delay(self, sent: float, halves: int) -> float:
        return sent / self._bytes_per_s

    def prepare(self) -> None:
        # At least what the device may send in a tick of 250 Hz, or the rate is not reached.
        burst = max(64 * 1024, math.ceil(self._bytes_per_s / 250))
        limit = f"rate {self.name} burst {burst} latency 200ms"
        tc("replace", "dev", self._device, "root", "tbf", *limit.split())


class Unlimited(Link):
    """The same device without a limit."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self._device = device

    def prepare(self) -> None:
        tc("replace", "dev", self._device, "root", "pfifo")


def tc(*words: str) -> None:
    subprocess.run(["tc", "qdisc", *words], check=True, capture_output=True, timeout=30)
