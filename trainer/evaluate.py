"""Loss, perplexity and bits per byte of token sequences, by a model on a mesh or by an exported one."""

import dataclasses
import math
from collections.abc import Callable
from typing import Protocol

from parallel.engine import Batch
from parallel.mesh import Mesh
from trainer.data.rows import Rows, on_device


class Evaluates(Protocol):
    """What can be evaluated: an `Engine`, or an `Exported` model."""

    mesh: Mesh

    def evaluate(self, batch: Batch) -> tuple[float, int]:
        """(cross-entropy sum, valid targets) of the batches of all data ranks; equal on all ranks."""
        ...


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """loss_sum: the cross-entropy of all targets, in nats. bytes: of the text that the targets are, if known."""

    loss_sum: float
    tokens: int
    bytes: int | None = None

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.loss_sum / self.tokens

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float | None:
        """Independent of the tokenizer; the ends of documents are predicted too, but have no bytes."""
        return self.loss_sum / math.log(2) / self.bytes if self.bytes else None

    def as_dict(self) -> dict[str, float | int | None]:
        """For JSON, which has no infinity."""
        return {
            "loss": self.loss,
            "perplexity": self.perplexity if math.isfinite(self.perplexity) else None,
            "bits_per_byte": self.bits_per_byte,
            "tokens": self.tokens,
            "bytes": self.bytes,
        }


def evaluate(
    model: Evaluates,
    sequences: Rows,
    micro_batch: int,
    limit: int | None = None,
    advance: Callable[[int], object] = lambda _: None,
) -> Evaluation:
    """Evaluate all sequences, or the first `limit` (a collective). micro_batch: sequences per data rank at once.

    advance: called with the sequences that are done.
    """
    mesh = model.mesh
    count = len(sequences) if limit is None else min(limit, len(sequences))
    across = mesh.data_size * micro_batch
    loss_sum, tokens = 0.0, 0
    for start in range(0, count, across):
        first = start + mesh.data_rank * micro_batch
        # Past the end stands padding, so that every rank has a batch of the same shape.
        rows = [i if i < count else len(sequences) for i in range(first, first + micro_batch)]
        more_loss, more_tokens = model.evaluate(on_device(sequences.rows(rows), mesh.device))
        loss_sum, tokens = loss_sum + more_loss, tokens + more_tokens
        advance(min(across, count - start))
    return Evaluation(loss_sum, tokens)
