"""What a run's config says to learn from: prepared text, or a task."""

from collections.abc import Iterator
from typing import Protocol

from parallel.engine import Batch
from trainer.config import RunConfig
from trainer.data.rows import Rows
from trainer.data.stream import Stream
from trainer.data.tasks.base import TaskRows
from trainer.data.tasks.samples import TaskSamples
from trainer.data.training import TrainingData


class Samples(Protocol):
    """An endless run of samples; sample i is a function of the config and i."""

    def batch(self, start: int, count: int, data_rank: int, data_size: int, micro_batch: int) -> Batch:
        """One data rank's part of the step that takes samples start..start+count-1."""
        ...

    def plan(self, samples: int) -> Iterator[str]:
        """Lines on what the first `samples` are."""
        ...


def samples(config: RunConfig) -> Samples:
    data, length, seed = config.data, config.data.sequence_length, config.run.seed
    if data.task is not None:
        return TaskSamples(data.task, length, config.model.vocab_size, seed)
    return TrainingData(data.weights, length, seed, data.packing)


def held_out_rows(config: RunConfig) -> Rows | None:
    """What the run is evaluated on, None where the config names nothing."""
    data, length = config.data, config.data.sequence_length
    if data.task is not None:
        return TaskRows(data.task, length, config.model.vocab_size, config.run.seed, held_out=True)
    return data.packing.pack(Stream.open(data.valid), length) if data.valid else None
