"""A task's training examples, as the samples of a run."""

from collections.abc import Iterator

import numpy as np
import torch

from parallel.engine import Batch
from trainer.data.order import draw_keys, slots
from trainer.data.rows import share, stacked
from trainer.data.tasks.base import TaskConfig, TaskRows


class TaskSamples:
    """An endless run of examples: new ones, or so many in a new order each time."""

    def __init__(self, task: TaskConfig, length: int, vocab_size: int, seed: int) -> None:
        self._rows, self._seed = TaskRows(task, length, vocab_size, seed, held_out=False), seed

    def batch(self, start: int, count: int, data_rank: int, data_size: int, micro_batch: int) -> Batch:
        """One data rank's part of the step that takes samples start..start+count-1."""
        samples = np.array(share(start, count, data_rank, data_size, micro_batch), dtype=np.int64)
        indices = slots(samples, len(self._rows), self._seed) if len(self._rows) else samples
        batch = stacked(map(self._rows.row, indices.tolist()))
        batch.keys = torch.from_numpy(draw_keys(samples, self._seed))
        return batch

    def plan(self, samples: int) -> Iterator[str]:
        count = len(self._rows)
        times = f"{samples / count:.2f} epochs of {count:,} examples" if count else f"{samples:,} examples, each new"
        yield f"{self._rows.task.kind}: {times}"
