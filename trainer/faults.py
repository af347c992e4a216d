"""What a run does about a loss or gradient that is not finite: stop, or leave the step out and go on.

The loss and the norm are sums over all ranks, so that all ranks take the same way.
"""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from models.limits import at_least
from parallel.engine import Batch, Engine
from trainer.appending import AppendingFile

FAULTS = "nonfinite.jsonl"


@dataclasses.dataclass(frozen=True)
class FaultsConfig:
    """policy: stop ends the run before the weights take the step up; skip leaves the step out, its samples too.

    most_skips: in a row; one more ends the run, because it is not the data then.
    """

    policy: Literal["stop", "skip"] = "stop"
    most_skips: int = 5

    def __post_init__(self) -> None:
        at_least(self, 1, "most_skips")


class Faults:
    """Counts and writes down the steps of one launch that were not finite."""

    def __init__(self, config: FaultsConfig, engine: Engine, folder: Path, say: Callable[[str], None]) -> None:
        self._config, self._engine, self._file, self._say = config, engine, folder / FAULTS, say
        self._skipped = 0

    def passed(self, step: int, loss: float, norm: float, batch: Batch, first_sample: int, micro_batches: int) -> bool:
        """Whether the step's gradient may be used (a collective when it may not).

        batch: this data rank's part. first_sample: of the step, in the run's order. Raises FloatingPointError on all
        ranks when the run must end.
        """
        if math.isfinite(loss) and math.isfinite(norm):
            self._skipped = 0
            return True
        ranges = self._suspects(batch, first_sample, micro_batches)
        if self._engine.mesh.is_main:
            record = {"step": step, "loss": str(loss), "grad_norm": str(norm), "samples": ranges}
            self._write(json.dumps(record) + "\n")
        self._skipped += 1
        if self._config.policy == "skip" and self._skipped <= self._config.most_skips:
            self._say(f"step {step} has loss {loss} and gradient norm {norm}: skipped, see {self._file}")
            return False
        raise FloatingPointError(self._sentence(step, loss, norm))

    def _write(self, line: str) -> None:
        """Rank 0 alone writes, and must not leave the others for a full disk."""
        try:
            with AppendingFile(self._file) as file:
                error = file.append(line.encode())
        except OSError as failed:
            error = failed
        if error is not None:
            self._say(f"warning: {self._file} could not be written ({error.strerror}); it lacks {line.strip()}")

    def _suspects(self, batch: Batch, first_sample: int, micro_batches: int) -> list[list[int]]:
        """[first, past the last] of the samples whose micro-batch has a loss that is not finite; without any (it was
        the backward pass, or a loss beside the cross-entropy), of all."""
        rows = batch.tokens.shape[0] // micro_batches
        across = rows * self._engine.mesh.data_size
        found = []
        for index in range(micro_batches):
            part = Batch(**{name: x[index * rows : (index + 1) * rows] for name, x in batch.side().items()})
            if not math.isfinite(self._engine.evaluate(part)[0]):
                start = first_sample + index * across
                found.append([start, start + across])
        return found or [[first_sample, first_sample + micro_batches * across]]

    def _sentence(self, step: int, loss: float, norm: float) -> str:
        skipped = f" after {self._skipped - 1} skipped in a row" if self._config.policy == "skip" else ""
        way = "" if skipped else ", or set train.faults.policy=skip"
        return (
            f"step {step}{skipped} has loss {loss} and gradient norm {norm}; the run stopped before the weights took "
            f"it up, and its checkpoints are as they were: see the samples in {self._file}, and resume with a smaller "
            f"optim.lr{way}"
        )
