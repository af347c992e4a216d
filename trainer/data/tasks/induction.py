"""The induction task (Olsson et al., arXiv 2209.11895; as posed in Fu et al., "H3", arXiv 2212.14052)."""

import dataclasses

import numpy as np

from models.loss import IGNORE
from trainer.data.tasks.base import Example, TaskConfig


@dataclasses.dataclass(frozen=True)
class InductionConfig(TaskConfig, kind="induction"):
    """Random tokens; one special token stands at a random place and again at the end, and what followed it is asked
    for. The special token is the vocabulary's last."""

    def refuse(self, length: int, vocab_size: int, named: str = "sequence_length") -> None:
        if length < 3:
            raise ValueError(f"induction takes a {named} of at least 3, not {length}")
        if vocab_size < 3:
            raise ValueError(f"induction takes a vocab_size of at least 3, not {vocab_size}")

    def draw(self, random: np.random.Generator, length: int, vocab_size: int, held_out: bool) -> Example:
        tokens_T = random.integers(vocab_size - 1, size=length)
        targets_T = np.full(length, IGNORE, dtype=np.int64)
        place = random.integers(length - 2)
        tokens_T[place] = tokens_T[-1] = vocab_size - 1
        targets_T[-1] = tokens_T[place + 1]
        return Example(tokens_T, targets_T)
