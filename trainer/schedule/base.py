"""What every schedule is: a factor on the optimiser's learning rate that depends on the step and on nothing else.

A run that is resumed, on whatever mesh, therefore goes on where it was.
"""

import dataclasses
import re
from types import MappingProxyType

from models.plugin import Plugin

# A whole number is optimiser steps; text is tokens, such as "200M" or "1.5B tokens".
Length = int | str
UNITS = MappingProxyType({"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12})
TOKENS = re.compile(r"(\d+(?:\.\d+)?)\s*([KMBT]?)(\s*tokens)?")


def tokens_of(name: str, length: str) -> float:
    """The tokens that the text names. Raises ValueError, naming the field `name`, for text that names none."""
    match = TOKENS.fullmatch(length.strip())
    if match is None or not (match[2] or match[3]):
        raise ValueError(
            f"{name} is {length!r}; write a whole number for steps, such as 2000, or tokens, such as 200M or 1B tokens"
        )
    return float(match[1]) * UNITS[match[2]]


def check_length(name: str, length: Length) -> None:
    """Raise ValueError, naming the field `name`, for what is no length."""
    if isinstance(length, str):
        tokens_of(name, length)
    elif length < 0:
        raise ValueError(f"{name} is {length}; it must be at least 0 steps")


def check_ratio(name: str, ratio: float) -> None:
    """Raise ValueError, naming the field `name`, for a factor that is no share of the highest learning rate."""
    if not 0 <= ratio <= 1:
        raise ValueError(f"{name} is {ratio}; it must lie in [0, 1]")


@dataclasses.dataclass(frozen=True)
class Span:
    """How long a run is. steps: of the whole run. tokens_per_step: global batch x sequence length."""

    steps: int
    tokens_per_step: int

    def steps_of(self, length: Length) -> int:
        """A length in steps; tokens are rounded up to whole steps."""
        if isinstance(length, str):
            return -int(-tokens_of("length", length) // self.tokens_per_step)
        return length


@dataclasses.dataclass(frozen=True)
class ScheduleConfig(Plugin, slot="schedule", folder="trainer.schedule"):
    """The learning rate over the steps.

    warmup: a line up to the optimiser's lr, which its last step reaches. A length is steps, or tokens as text.
    """

    warmup: Length = 0

    def __post_init__(self) -> None:
        check_length("warmup", self.warmup)

    def refuse(self, span: Span) -> None:
        """Raise ValueError if the schedule cannot be on a run of this length."""

    def factor(self, step: int, span: Span) -> float:
        """What the optimiser's lr is multiplied by in step `step` (from 0)."""
        warmup = span.steps_of(self.warmup)
        if step < warmup:
            return (step + 1) / warmup
        return self.after_warmup(step + 1 - warmup, max(1, span.steps - warmup), span)

    def after_warmup(self, done: int, steps: int, span: Span) -> float:
        """The factor in the step number `done` (from 1) of the `steps` that follow the warm-up."""
        raise NotImplementedError
