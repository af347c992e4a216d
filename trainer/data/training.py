"""The samples of a run, in an order that knows neither ranks nor batch sizes."""

from collections.abc import Iterator, Mapping

import numpy as np
import torch

from parallel.engine import Batch
from trainer.data.blend import Blend
from trainer.data.order import draw_keys, mix, slots
from trainer.data.packing.base import PackingConfig
from trainer.data.packing.concatenate import Concatenate
from trainer.data.rows import share, stacked
from trainer.data.stream import Stream

# Up to so many epochs, repeated text teaches nearly what new text would (Muennighoff et al., arXiv 2305.16264).
MOST_EPOCHS = 4


class TrainingData:
    """An endless run of samples; sample i is a pure function of (weights, packing, length, seed, i).

    weights: of each dataset, by the path that its .bin and .idx share, in the order that they are given. length: tokens
    of a sequence. packing: default concatenate. Raises ValueError where one of them is damaged, or has no sequence to
    train on.
    """

    def __init__(
        self, weights: Mapping[str, float], length: int, seed: int, packing: PackingConfig | None = None
    ) -> None:
        packing = packing or Concatenate()
        self.sources = [packing.pack(Stream.open(prefix), length) for prefix in weights]
        self._blend, self._seeds = Blend([*weights.values()]), source_seeds(seed, len(weights))
        for source in self.sources:
            if not source.full:
                raise ValueError(
                    f"the data {source.stream.name} has {source.tokens} tokens and one sequence takes {length}; "
                    "prepare more text, or use a smaller data.sequence_length"
                )

    def batch(self, start: int, count: int, data_rank: int, data_size: int, micro_batch: int) -> Batch:
        """One data rank's part of the step that takes samples start..start+count-1."""
        samples = np.array(share(start, count, data_rank, data_size, micro_batch), dtype=np.int64)
        sources, turns = self._blend.find(samples)
        rows = np.empty_like(turns)
        for k, (source, seed) in enumerate(zip(self.sources, self._seeds, strict=True)):
            rows[sources == k] = slots(turns[sources == k], source.full, seed)
        batch = stacked(self.sources[k].row(row) for k, row in zip(sources.tolist(), rows.tolist(), strict=True))
        batch.keys = torch.from_numpy(draw_keys(samples, self._seeds[0]))
        return batch

    def plan(self, samples: int) -> Iterator[str]:
        """A line on every source: how much of the first `samples` it gives, and how often it is gone through."""
        for source, count in zip(self.sources, self._blend.counts(samples), strict=True):
            epochs = count / source.full
            line = (
                f"{source.stream.name}: {count:,} of {samples:,} samples ({count / samples:.2%}), "
                f"{epochs:.2f} epochs of {source}"
            )
            if epochs > MOST_EPOCHS:
                line = f"warning: {line}; what is repeated more than {MOST_EPOCHS} times teaches less and less"
            yield line


def source_seeds(seed: int, count: int) -> list[int]:
    """A seed for each source. The first one's is `seed`, so that a blend of one has the order of its dataset alone."""
    # mix(0) is 0.
    return [seed ^ (int(drawn) & (2**63 - 1)) for drawn in mix(np.arange(count, dtype=np.uint64))]
