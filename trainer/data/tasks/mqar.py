"""Multi-query associative recall (Arora et al., "Zoology", arXiv 2312.04927).

    k1 v1 k2 v2 ... kn vn  0 0  k2 0  0 0  k1 0 ...   ->   v2 at the second k2, v1 at the second k1, ...

Shape suffixes: P pairs, T tokens.
"""

import dataclasses
from types import MappingProxyType

import numpy as np

from models.limits import at_least
from models.loss import IGNORE
from trainer.data.tasks.base import Example, TaskConfig

# Tokens between an answer's place and where it was shown, in powers of this.
STEP = 4


@dataclasses.dataclass(frozen=True)
class MQARConfig(TaskConfig, kind="mqar"):
    """Multi-query associative recall: keys and values are shown, then keys are asked for their values.

    num_pairs: keys with a value each. passes: how often all of them are shown. power: a key is asked for at slot s with
    probability in proportion to power * s^(power - 1), so that 1 is anywhere and less is soon. random_fill: other
    places hold random tokens, which may be keys that nobody asks about, instead of token 0.
    """

    num_pairs: int = 4
    passes: int = 1
    power: float = 0.01
    random_fill: bool = False

    example = MappingProxyType({"num_pairs": 2})

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "num_pairs", "passes")
        if not 0 < self.power <= 1:
            raise ValueError(f"power is {self.power}; it must lie in (0, 1], where 1 asks anywhere and less asks soon")

    def refuse(self, length: int, vocab_size: int, named: str = "sequence_length") -> None:
        needed = 2 * self.num_pairs * (self.passes + 1)
        if length % 2 or length < needed:
            raise ValueError(
                f"mqar with num_pairs={self.num_pairs} and passes={self.passes} takes an even {named} of at "
                f"least {needed}, not {length}"
            )
        if vocab_size <= length or self.num_pairs >= vocab_size // 2:
            least = max(length + 1, 2 * self.num_pairs + 2)
            raise ValueError(
                f"mqar with num_pairs={self.num_pairs} and {named}={length} takes a vocab_size of at least "
                f"{least}, not {vocab_size}"
            )

    def draw(self, random: np.random.Generator, length: int, vocab_size: int, held_out: bool) -> Example:
        half, shown = vocab_size // 2, 2 * self.num_pairs * self.passes
        key_P = 1 + random.choice(half - 1, self.num_pairs, replace=False)
        value_P = half + random.choice(vocab_size - half, self.num_pairs, replace=False)
        weights = np.arange(1, (length - shown) // 2 + 1) ** (self.power - 1.0)
        slot_P = random.choice(weights.size, self.num_pairs, replace=False, p=weights / weights.sum())
        asked_P = shown + 2 * slot_P
        tokens_T = random.integers(vocab_size, size=length) if self.random_fill else np.zeros(length, dtype=np.int64)
        tokens_T[:shown] = np.tile(np.stack([key_P, value_P], 1).ravel(), self.passes)
        tokens_T[asked_P] = key_P
        targets_T = np.full(length, IGNORE, dtype=np.int64)
        targets_T[asked_P] = value_P
        distance_P = asked_P - (shown - 2 * self.num_pairs + 2 * np.arange(self.num_pairs))
        return Example(tokens_T, targets_T, slices(asked_P, distance_P, length))


def slices(asked_P: np.ndarray, distance_P: np.ndarray, length: int) -> dict[str, np.ndarray]:
    """The places that are asked, by how many tokens ago the key was last shown."""
    found: dict[str, np.ndarray] = {}
    bound = STEP
    while bound < STEP * length:
        inside_P = (distance_P <= bound) & (distance_P > bound // STEP)
        found[f"distance<={bound}"] = np.isin(np.arange(length), asked_P[inside_P])
        bound *= STEP
    return {name: part for name, part in found.items() if part.any()}
