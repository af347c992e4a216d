"""The order of a blend: which source each sample of an endless run comes from, and as the source's how many-th.

Weights become whole shares of a period of P samples, and each period is filled alike. Source k with share s of P takes
its sample j = 0, 1, ... no earlier than slot floor(j P / s) and before slot ceil((j + 1) P / s); of the sources that
may, the one whose time ends first is taken. All can always be on time, and so after any number n of samples every
source has had n s / P, give or take less than one sample; after whole periods it has had exactly that.

Source: Baruah, Cohen, Plaxton & Varvel, "Proportionate progress", Algorithmica 15 (1996), whose windows these are;
earliest deadlines first is optimal for tasks of one slot.
"""

import heapq
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

# Longest period: filling it takes a few seconds.
LONGEST = 10**6


def shares(weights: Sequence[float]) -> tuple[int, ...]:
    """Whole numbers in the proportions of the weights, as these are written in decimals; their sum is the period.

    They are exact if a period of at most LONGEST allows it, and are else rounded to it by largest remainder. Raises
    ValueError for a weight of which no sample would be left.
    """
    parts = [Fraction(repr(weight)) for weight in weights]
    exact = [part / sum(parts) for part in parts]
    period = min(LONGEST, math.lcm(*(part.denominator for part in exact)))
    whole = [math.floor(part * period) for part in exact]
    by_remainder = sorted(range(len(exact)), key=lambda k: (whole[k] - exact[k] * period, k))
    for k in by_remainder[: period - sum(whole)]:
        whole[k] += 1
    for weight, share in zip(weights, whole, strict=True):
        if not share:
            raise ValueError(
                f"weight {weight} of {sum(weights):g} in all is too little for one of {LONGEST:,} samples; "
                "give it more, or leave its source out"
            )
    divisor = math.gcd(*whole)
    return tuple(share // divisor for share in whole)


def fill(whole: Sequence[int]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Of each slot of a period, the source, and how many of the period's slots before it are the same source's."""
    period = sum(whole)
    sources, turns = np.empty(period, dtype=np.int32), np.empty(period, dtype=np.int32)
    turn = [0] * len(whole)
    # (slot at which it may be taken, source) and (slot before which it must be, source).
    waiting, ready = [(0, k) for k in range(len(whole))], list[tuple[int, int]]()
    for slot in range(period):
        while waiting and waiting[0][0] <= slot:
            _, k = heapq.heappop(waiting)
            heapq.heappush(ready, (-(-(turn[k] + 1) * period // whole[k]), k))
        _, k = heapq.heappop(ready)
        sources[slot], turns[slot] = k, turn[k]
        turn[k] += 1
        if turn[k] < whole[k]:
            heapq.heappush(waiting, (turn[k] * period // whole[k], k))
    return sources, turns


class Blend:
    """The order for `weights`, one of each source."""

    def __init__(self, weights: Sequence[float]) -> None:
        self.shares = shares(weights)
        self._sources, self._turns = fill(self.shares)

    def find(self, samples: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Of each sample, its source, and how many samples before it were the same source's."""
        periods, slots = np.divmod(samples, len(self._sources))
        sources = self._sources[slots].astype(np.int64)
        return sources, periods * np.array(self.shares, dtype=np.int64)[sources] + self._turns[slots]

    def counts(self, samples: int) -> list[int]:
        """How many of the first `samples` come from each source."""
        periods, rest = divmod(samples, len(self._sources))
        begun = np.bincount(self._sources[:rest], minlength=len(self.shares))
        return [periods * share + int(more) for share, more in zip(self.shares, begun, strict=True)]
