"""Which of many combinations CI tries; the others have the slow marker."""

from collections.abc import Iterable, Sequence
from typing import Any

import pytest

SLOW = pytest.mark.slow


def slow(cases: Iterable[Any]) -> list[Any]:
    """For `pytest.mark.parametrize`: these, under the marker. A tuple is a case of several parameters."""
    return [pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=SLOW) for case in cases]


def in_turn(kinds: Iterable[Any], places: Sequence[Any]) -> list[Any]:
    """For `pytest.mark.parametrize`: every pair. Each kind is tried in one of the places, which take turns, and in the
    others under the marker."""
    return [
        pytest.param(kind, place, marks=[] if index == turn % len(places) else [SLOW])
        for turn, kind in enumerate(kinds)
        for index, place in enumerate(places)
    ]
