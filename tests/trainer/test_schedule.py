"""Schedules against their closed forms."""

import math
import re
from typing import Any

import pytest

from configs.validate import parse
from trainer.schedule.base import Length, ScheduleConfig, Span

SPAN = Span(steps=20, tokens_per_step=1000)


def factors(span: Span = SPAN, **fields: Any) -> list[float]:
    schedule: ScheduleConfig = parse(ScheduleConfig, fields)
    return [schedule.factor(step, span) for step in range(span.steps)]


@pytest.mark.parametrize("kind", sorted(ScheduleConfig.kinds()))
def test_warm_up_ends_in_its_last_step(kind: str) -> None:
    needs: dict[str, Any] = {"decay": 5} if kind == "wsd" else {}
    assert factors(kind=kind, warmup=4, **needs)[:4] == [0.25, 0.5, 0.75, 1.0]


def test_constant() -> None:
    assert factors(kind="constant", warmup=2) == [0.5] + [1.0] * 19


@pytest.mark.parametrize("warmup", [0, 4])
def test_linear_and_cosine(warmup: int) -> None:
    rest = 20 - warmup
    linear = factors(kind="linear", warmup=warmup, min_ratio=0.2)[warmup:]
    cosine = factors(kind="cosine", warmup=warmup, min_ratio=0.2)[warmup:]
    assert linear == pytest.approx([1 - 0.8 * k / rest for k in range(1, rest + 1)])
    assert cosine == pytest.approx([0.6 + 0.4 * math.cos(math.pi * k / rest) for k in range(1, rest + 1)])


@pytest.mark.parametrize(
    ("shape", "left"),
    [
        ("linear", lambda x: 1 - x),
        ("sqrt", lambda x: 1 - math.sqrt(x)),
        ("cosine", lambda x: (1 + math.cos(math.pi * x)) / 2),
    ],
)
def test_wsd(shape: str, left: Any) -> None:
    found = factors(kind="wsd", warmup=3, decay=5, shape=shape, min_ratio=0.1)
    assert found[3:15] == [1.0] * 12
    assert found[15:] == pytest.approx([0.1 + 0.9 * left(k / 5) for k in range(1, 6)])


def test_a_stable_phase_may_be_prolonged() -> None:
    """Up to the decay, a longer run has the learning rates of a shorter one: it can go on from before the decay."""
    short = factors(kind="wsd", warmup=3, decay=5)
    longer = factors(Span(40, 1000), kind="wsd", warmup=3, decay=5)
    assert short[:15] == longer[:15] and short[15] < longer[15]


@pytest.mark.parametrize(
    ("length", "steps"),
    [(7, 7), ("7K tokens", 7), ("7.0K", 7), ("7001 tokens", 8), ("1 tokens", 1), ("0.5M", 500), ("2B", 2_000_000)],
)
def test_lengths_in_tokens(length: Length, steps: int) -> None:
    assert SPAN.steps_of(length) == steps
    assert factors(kind="constant", warmup=length) == factors(kind="constant", warmup=steps)


@pytest.mark.parametrize("length", ["7", "7 steps", "1e9 tokens", "-1M", "M", "", "1 G", "tokens"])
def test_what_is_no_length_is_refused(length: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"decay is {length!r}; write a whole number for steps")):
        parse(ScheduleConfig, {"kind": "wsd", "decay": length})


def test_a_decay_longer_than_the_run_is_refused() -> None:
    schedule = parse(ScheduleConfig, {"kind": "wsd", "warmup": 4, "decay": "17K tokens"})
    with pytest.raises(
        ValueError, match=r"decay is 17 steps and schedule.warmup leaves 16 of the run's 20; shorten one"
    ):
        schedule.refuse(SPAN)
    schedule.refuse(Span(21, 1000))
