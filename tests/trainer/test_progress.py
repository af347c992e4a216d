"""Long work says how far it is: never at every step, and also where its total was an underestimate."""

import io
import time

import pytest
from rich.console import Console

from trainer import progress


@pytest.mark.parametrize(
    ("shown", "half", "over"),
    [
        (progress.counting, "work: 2,000,000 of 4,000,000, 10 s left", "work: 6,000,000 of 4,000,000, 0 s left"),
        (
            progress.counting_bytes,
            "work: 2.0 MB of 4.0 MB, 0.2 MB/s, 10 s left",
            "work: 6.0 MB of 4.0 MB, 0.3 MB/s, 0 s left",
        ),
    ],
)
def test_lines_of_a_log(shown: object, half: str, over: str, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 5.0, 10.0, 15.0, 20.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(progress, "SILENCE", 10.0)
    out = io.StringIO()
    with shown(Console(file=out), "work", 4_000_000) as advance:  # type: ignore[operator]
        for step in (1, 1, 2, 2):
            advance(step * 1_000_000)
    assert out.getvalue().splitlines() == [half, over]
