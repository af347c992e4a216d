"""Copying a string (after Jelassi et al., "Repeat After Me", arXiv 2402.01032): <start> s <separator> s <end>."""

import dataclasses

import numpy as np

from models.limits import at_least
from models.loss import IGNORE
from trainer.data.tasks.base import Example, TaskConfig

START, SEPARATOR, END = range(3)


@dataclasses.dataclass(frozen=True)
class CopyingConfig(TaskConfig, kind="copying"):
    """Copy a string of letters: its letters and the end are asked for. A sequence of length L has (L - 2) / 2 of them.

    letters: how many there are, as tokens 3, 4, ...
    """

    letters: int = 26

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 2, "letters")

    def refuse(self, length: int, vocab_size: int, named: str = "sequence_length") -> None:
        if length % 2 or length < 4:
            raise ValueError(f"copying takes an even {named} of at least 4, not {length}")
        if vocab_size < self.letters + 3:
            raise ValueError(
                f"copying with letters={self.letters} takes a vocab_size of at least {self.letters + 3}, not "
                f"{vocab_size}"
            )

    def draw(self, random: np.random.Generator, length: int, vocab_size: int, held_out: bool) -> Example:
        string = 3 + random.integers(self.letters, size=length // 2 - 1)
        whole = np.concatenate([[START], string, [SEPARATOR], string, [END]])
        targets_T = whole[1:].copy()
        targets_T[: length // 2] = IGNORE
        return Example(whole[:-1], targets_T)
