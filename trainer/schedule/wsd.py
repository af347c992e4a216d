"""Warm-up, stable, decay: constant until the last part of the run.

Sources: MiniCPM, arXiv 2404.06395; the shape of the decay: Haegele et al., arXiv 2405.18392.
"""

import dataclasses
import math
from types import MappingProxyType
from typing import Literal

from trainer.schedule.base import Length, ScheduleConfig, Span, check_length, check_ratio

SHAPES = MappingProxyType(
    {
        "linear": lambda x: 1 - x,
        "sqrt": lambda x: 1 - math.sqrt(x),
        "cosine": lambda x: 0.5 * (1 + math.cos(math.pi * x)),
    }
)


@dataclasses.dataclass(frozen=True)
class WSD(ScheduleConfig, kind="wsd"):
    """Constant after the warm-up, then a decay over the last steps. A run can be prolonged from before its decay.

    decay: length of the decay, in steps, or in tokens as text. shape: of the decay; sqrt is 1 - sqrt(x). min_ratio: the
    factor in the run's last step.
    """

    decay: Length = dataclasses.field(kw_only=True)
    shape: Literal["linear", "sqrt", "cosine"] = "sqrt"
    min_ratio: float = 0.0

    example = MappingProxyType({"decay": 10})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_length("decay", self.decay)
        check_ratio("min_ratio", self.min_ratio)

    def refuse(self, span: Span) -> None:
        decay, rest = span.steps_of(self.decay), span.steps - span.steps_of(self.warmup)
        if decay > rest:
            raise ValueError(
                f"schedule.decay is {decay} steps and schedule.warmup leaves {max(rest, 0)} of the run's {span.steps}; "
                "shorten one of them, or raise train.steps"
            )

    def after_warmup(self, done: int, steps: int, span: Span) -> float:
        decay = span.steps_of(self.decay)
        into = done - (steps - decay)
        if into <= 0:
            return 1.0
        return self.min_ratio + (1 - self.min_ratio) * SHAPES[self.shape](min(1.0, into / decay))
