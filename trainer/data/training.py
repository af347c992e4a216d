"""The samples of a run, in an order that knows neither ranks nor batch sizes."""

import numpy as np

from parallel.engine import Batch
from trainer.data.order import slots
from trainer.data.sequences import Sequences


def share(start: int, count: int, data_rank: int, data_size: int, micro_batch: int) -> list[int]:
    """The samples, of start..start+count-1, that one data rank takes, micro-batch-major.

    Micro-batch m is the contiguous run of data_size * micro_batch samples from start + m * data_size * micro_batch, of
    which each rank takes its part in order. Raises ValueError when count does not divide.
    """
    across = data_size * micro_batch
    if count % across:
        near = max(across, count // across * across)
        raise ValueError(
            f"global_batch is {count}, which {data_size} data ranks x micro_batch {micro_batch} = {across} must "
            f"divide; use global_batch={near}, or another micro_batch"
        )
    first = start + data_rank * micro_batch
    return [first + m * across + i for m in range(count // across) for i in range(micro_batch)]


class TrainingData:
    """An endless run of samples; sample i is a pure function of (seed, i)."""

    def __init__(self, prefix: str, length: int, seed: int) -> None:
        self.sequences, self.seed = Sequences(prefix, length), seed
        if not self.sequences.full:
            raise ValueError(
                f"the data {prefix} has {self.sequences.tokens} tokens and one sequence takes {length}; "
                "prepare more text, or use a smaller data.sequence_length"
            )

    def batch(self, start: int, count: int, data_rank: int, data_size: int, micro_batch: int) -> Batch:
        """One data rank's part of the step that takes samples start..start+count-1."""
        samples = np.array(share(start, count, data_rank, data_size, micro_batch), dtype=np.int64)
        return self.sequences.rows(slots(samples, self.sequences.full, self.seed).tolist())
