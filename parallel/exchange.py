"""The ways of rows to the ranks of their experts, and back.

`Direct` sends from every rank to every rank. `TwoLevel` collects what a machine has for a place of other machines at
the rank of that place first, and sends it from there: with N machines of L ranks N messages cross a rank's link in
place of N L, each L times as large (HetuMoE, arXiv 2203.14685, section 3; Tutel's 2DH, arXiv 2206.03382, section 3.4).
Shape suffixes: M rows, R ranks that share experts, E experts of a rank, L ranks of a machine, N machines, D width.
"""

import dataclasses
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from models.kernels.picks import in_order
from parallel.in_flight import Flight, Start, Started
from parallel.ranks import Ranks


@dataclasses.dataclass(frozen=True)
class Leg:
    """One exchange: `send[i]` rows in turn go to rank i, and `receive[i]` come. before: the order in which they are put
    before that; None for as they are."""

    ranks: Ranks
    send: list[int]
    receive: list[int]
    before: Tensor | None = None

    def start(self, x_MD: Tensor) -> Flight:
        x_MD = x_MD if self.before is None else x_MD.index_select(0, self.before)
        return Flight(x_MD, self._to(self.receive, self.send), self.returning())

    def start_back(self, y_MD: Tensor) -> Flight:
        """The way back of as many rows."""
        return Flight(y_MD, self.returning(), self._to(self.receive, self.send))

    def landed_back(self, flight: Flight) -> Tensor:
        """Those rows, as they were before `start`."""
        y_MD = flight.wait()
        return y_MD if self.before is None else y_MD.index_select(0, in_order(self.before, len(y_MD)))

    def returning(self) -> Start:
        return self._to(self.send, self.receive)

    def _to(self, receive: list[int], send: list[int]) -> Start:
        def start(x: Tensor) -> Started:
            out = x.new_empty((sum(receive), *x.shape[1:]))
            group = self.ranks.group
            return out, dist.all_to_all_single(out, x.contiguous(), receive, send, group=group, async_op=True)

        return start


@dataclasses.dataclass(frozen=True)
class Route:
    """legs: in turn. counts_RE: the rows that arrive, from each rank in order, for each of this rank's experts."""

    legs: tuple[Leg, ...]
    counts_RE: Tensor


class Exchange(Protocol):
    size: int

    def numbers(self, expert: Tensor, local: int) -> Tensor:
        """The experts, of which each rank has `local`, numbered in the order in which their rows are sent."""
        ...

    def route(self, counts: Tensor, local: int) -> Route:
        """Of so many rows for each number, which lie in this order (a collective)."""
        ...


class Direct:
    def __init__(self, ranks: Ranks) -> None:
        self.ranks, self.size = ranks, ranks.size

    def numbers(self, expert: Tensor, local: int) -> Tensor:
        return expert

    @torch.compiler.disable()
    def route(self, counts: Tensor, local: int) -> Route:
        counts_RE = counts.unflatten(0, (self.size, local))
        theirs_RE = exchanged(counts_RE, self.ranks)
        return Route((Leg(self.ranks, sizes(counts_RE), sizes(theirs_RE)),), theirs_RE)


class TwoLevel:
    """near: the ranks of this machine. far: those of the same place on all machines. Together they are numbered by
    machine, and on each by place."""

    def __init__(self, near: Ranks, far: Ranks) -> None:
        self.near, self.far, self.size = near, far, near.size * far.size

    def numbers(self, expert: Tensor, local: int) -> Tensor:
        """By place, and of each by machine."""
        rank, own = expert // local, expert % local
        machine, place = rank // self.near.size, rank % self.near.size
        return (place * self.far.size + machine) * local + own

    @torch.compiler.disable()
    def route(self, counts: Tensor, local: int) -> Route:
        by_place_LNE = counts.unflatten(0, (self.near.size, self.far.size, local))
        collected_LNE = exchanged(by_place_LNE, self.near)
        onward_NLE = collected_LNE.transpose(0, 1).contiguous()
        theirs_NLE = exchanged(onward_NLE, self.far)
        first = Leg(self.near, sizes(by_place_LNE), sizes(collected_LNE))
        second = Leg(self.far, sizes(onward_NLE), sizes(theirs_NLE), swapped(collected_LNE))
        return Route((first, second), theirs_NLE.flatten(0, 1))


def exchanged(counts: Tensor, ranks: Ranks) -> Tensor:
    """counts[i] of every rank goes to rank i."""
    out = torch.empty_like(counts)
    dist.all_to_all_single(out, counts, group=ranks.group)
    return out


def sizes(counts: Tensor) -> list[int]:
    """Of the messages to, or from, the ranks along the first dimension."""
    return counts.flatten(1).sum(1).tolist()


def swapped(counts: Tensor) -> Tensor:
    """The order that puts rows that lie by (first, second) dimension of `counts` by (second, first)."""
    first, second = counts.shape[:2]
    place = torch.arange(second, device=counts.device).repeat(first)
    return place.repeat_interleave(counts.flatten(2).sum(2).flatten()).argsort(stable=True)
