"""Learning rates that fall from the end of the warm-up to the end of the run."""

import dataclasses
import math

from trainer.schedule.base import ScheduleConfig, Span, check_ratio


@dataclasses.dataclass(frozen=True)
class Decay(ScheduleConfig):
    """min_ratio: the factor in the run's last step."""

    min_ratio: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ratio("min_ratio", self.min_ratio)

    def after_warmup(self, done: int, steps: int, span: Span) -> float:
        return self.min_ratio + (1 - self.min_ratio) * self.left(min(1.0, done / steps))

    def left(self, x: float) -> float:
        """How much of the fall is left, from 1 to 0, when the share x of the decay is over."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Cosine(Decay, kind="cosine"):
    """Half a cosine down to min_ratio (Loshchilov & Hutter, arXiv 1608.03983, without restarts)."""

    def left(self, x: float) -> float:
        return 0.5 * (1 + math.cos(math.pi * x))


@dataclasses.dataclass(frozen=True)
class Linear(Decay, kind="linear"):
    """A line down to min_ratio."""

    def left(self, x: float) -> float:
        return 1 - x
