"""A constant learning rate after the warm-up."""

import dataclasses

from trainer.schedule.base import ScheduleConfig, Span


@dataclasses.dataclass(frozen=True)
class Constant(ScheduleConfig, kind="constant"):
    """The optimiser's lr from the end of the warm-up to the end of the run."""

    def after_warmup(self, done: int, steps: int, span: Span) -> float:
        return 1.0
