"""Best-fit-decreasing bin packing of whole numbers.

The longest item goes first, each into the bin with the least room that is enough, or else into a new one. Items of one
size follow one another, so that a bin of room r takes r // size of them at once, and bins of equal room that were
opened one after another are one entry, a run. The work in Python is then by runs, of which there are far fewer than
items where many items have one size; the rest is numpy's.

Source: D. S. Johnson, "Near-optimal bin packing algorithms", MIT 1973; for documents: Ding et al., "Fewer Truncations
Improve Language Modeling", arXiv 2404.10830.
Shape suffixes: N items, R runs.
"""

import bisect

import numpy as np
from numpy.typing import NDArray


class Rooms:
    """Open bins, as runs [start, stop), by the room that each bin of a run has left."""

    def __init__(self) -> None:
        self._rooms = list[int]()  # in ascending order
        self._runs = dict[int, list[tuple[int, int]]]()

    def put(self, room: int, start: int, stop: int) -> None:
        """A run without a bin, and bins without room, are not kept."""
        if start < stop and room:
            if room not in self._runs:
                bisect.insort(self._rooms, room)
                self._runs[room] = []
            self._runs[room].append((start, stop))

    def take(self, size: int) -> tuple[int, int, int] | None:
        """Room, start and stop of a run with the least room that is at least `size`, which is then the caller's."""
        at = bisect.bisect_left(self._rooms, size)
        if at == len(self._rooms):
            return None
        room = self._rooms[at]
        start, stop = self._runs[room].pop()
        if not self._runs[room]:
            del self._runs[room], self._rooms[at]
        return room, start, stop


def best_fit_decreasing(sizes_N: NDArray[np.int64], capacity: int) -> NDArray[np.int64]:
    """The bin of each item. sizes: from 1 to capacity; of equal ones, the earlier item goes first."""
    counts = np.bincount(sizes_N)
    values = np.flatnonzero(counts)
    assert values[0] >= 1 and values[-1] <= capacity
    rooms, bins, filled = Rooms(), 0, list[tuple[int, int, int]]()
    for size, count in zip(values[::-1].tolist(), counts[values[::-1]].tolist(), strict=True):
        while count:
            found = rooms.take(size)
            if found is None:
                found = capacity, bins, bins - (-count // (capacity // size))
                bins = found[2]
            room, start, stop = found
            each = room // size
            taken = min(count, each * (stop - start))
            last = start + taken // each
            rooms.put(room - each * size, start, last)
            if part := taken % each:
                rooms.put(room - part * size, last, last + 1)
            rooms.put(room, last + (part > 0), stop)
            filled.append((taken, start, each))
            count -= taken
    taken_R, start_R, each_R = np.array(filled, dtype=np.int64).reshape(-1, 3).T
    nth_N = np.arange(sizes_N.size) - np.repeat(taken_R.cumsum() - taken_R, taken_R)
    # As the smallest type, because numpy sorts numbers of 16 bits by counting.
    order_N = np.argsort((capacity - sizes_N).astype(np.min_scalar_type(capacity)), kind="stable")
    bins_N = np.empty(sizes_N.size, dtype=np.int64)
    bins_N[order_N] = np.repeat(start_R, taken_R) + nth_N // np.repeat(each_R, taken_R)
    return bins_N
