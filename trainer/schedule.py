"""The learning rate over the steps."""

import math

from trainer.config import ScheduleConfig


def factor(step: int, steps: int, config: ScheduleConfig) -> float:
    """What the optimiser's lr is multiplied by in step `step` (from 0) of `steps`.

    The warm-up ends at 1 in its last step, and the decay at min_ratio in the run's last.
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.kind == "constant":
        return 1.0
    done = min(1.0, (step + 1 - config.warmup_steps) / max(1, steps - config.warmup_steps))
    share = 0.5 * (1 + math.cos(math.pi * done)) if config.kind == "cosine" else 1 - done
    return config.min_ratio + (1 - config.min_ratio) * share
