"""Synthetic tasks: examples that are made, not read, and what a model's answers to them are worth.

Example i is a function of (task, length, vocabulary, seed, i), so that all ranks, and a run that is resumed, see the
same ones. Shape suffixes: N examples, T tokens of an example, V vocabulary.
"""

import dataclasses

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.limits import at_least
from models.loss import IGNORE
from models.plugin import Plugin
from trainer.data.rows import Rows, padding


@dataclasses.dataclass
class Example:
    """One sequence. tokens_T: the input. targets_T: the answer at each token, IGNORE where none is asked for.

    slices: places that are also looked at on their own, by name, bool [T] each.
    """

    tokens_T: NDArray[np.int64]
    targets_T: NDArray[np.int64]
    slices: dict[str, NDArray[np.bool_]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class TaskConfig(Plugin, slot="task", folder="trainer.data.tasks"):
    """A synthetic task to train on and to be examined in.

    examples: how many different ones training goes through, again and again; 0 is a new one every time. held_out: how
    many the task is examined with; they are other ones.
    """

    examples: int = dataclasses.field(default=0, kw_only=True)
    held_out: int = dataclasses.field(default=1024, kw_only=True)

    def __post_init__(self) -> None:
        at_least(self, 0, "examples")
        at_least(self, 1, "held_out")

    def refuse(self, length: int, vocab_size: int, named: str = "sequence_length") -> None:
        """Raise ValueError where an example does not fit a sequence of this length or a vocabulary of this size.

        named: what the user sets the length with.
        """

    def draw(self, random: np.random.Generator, length: int, vocab_size: int, held_out: bool) -> Example:
        """A new example of `length` tokens. held_out: one that training never sees, where that can be told."""
        raise NotImplementedError

    def measure(self, logits_TV: Tensor, example: Example) -> dict[str, tuple[float, float]]:
        """(sum, count) of each figure over one example: by default, answers and whole examples that are right.

        An example is right when greedy decoding would give all of its answers.
        """
        asked_T = example.targets_T != IGNORE
        right_T = logits_TV.argmax(-1).cpu().numpy() == example.targets_T
        figures = {"accuracy": asked_T, **{f"accuracy/{name}": part for name, part in example.slices.items()}}
        sums = {name: (float(right_T[part].sum()), float(part.sum())) for name, part in figures.items()}
        return {**sums, "exact": (float(right_T[asked_T].all()), 1.0)}


class TaskRows(Rows):
    """Examples by index. held_out: those to be examined with."""

    def __init__(self, task: TaskConfig, length: int, vocab_size: int, seed: int, held_out: bool) -> None:
        super().__init__(length)
        task.refuse(length, vocab_size)
        self.task, self._vocab_size, self._seed, self._held_out = task, vocab_size, seed, held_out

    def __len__(self) -> int:
        return self.task.held_out if self._held_out else self.task.examples

    def example(self, index: int) -> Example:
        key = np.array([2 * self._seed + self._held_out, index], dtype=np.uint64)
        random = np.random.Generator(np.random.Philox(key=key))
        return self.task.draw(random, self.length, self._vocab_size, self._held_out)

    def row(self, index: int) -> tuple[Tensor, ...]:
        """As in `Rows`; without an end where every example is new."""
        tokens_T, targets_T, documents_T, positions_T = padding(self.length)
        if index < len(self) or not len(self):
            example = self.example(index)
            tokens_T, targets_T = example.tokens_T, example.targets_T
            documents_T, positions_T = np.zeros_like(tokens_T), np.arange(self.length)
        return tuple(map(torch.from_numpy, (tokens_T, targets_T, documents_T, positions_T)))
