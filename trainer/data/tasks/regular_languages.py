"""In-context regular languages (Akyurek et al., "In-Context Language Learning", arXiv 2401.12973).

A sequence holds strings of one random automaton, which a model can learn to continue only by reading them.
Shape suffixes: T tokens, V vocabulary.
"""

import dataclasses
import hashlib

import numpy as np
import torch
from torch import Tensor

from models.limits import at_least
from models.loss import IGNORE
from models.params import upcast
from trainer.data.tasks.automaton import Automaton, Sizes, random_automaton
from trainer.data.tasks.base import Example, TaskConfig

PADDING, SEPARATOR, FIRST = range(3)
LEAST = 4
# One automaton in so many is kept for examination.
HELD_OUT = 10


@dataclasses.dataclass
class Strings(Example):
    """legal_TV: what the automaton may continue with behind each token."""

    legal_TV: np.ndarray = dataclasses.field(kw_only=True)


@dataclasses.dataclass(frozen=True)
class RegularLanguagesConfig(TaskConfig, kind="regular_languages"):
    """Continue strings of a random automaton: any symbol that it allows is right.

    states, symbols, edges: the most that an automaton has, edges of a state. string: the longest string. least_strings,
    most_strings: of a sequence, which is cut at its length or filled up with padding.
    """

    states: int = 12
    symbols: int = 18
    edges: int = 3
    string: int = 49
    least_strings: int = 10
    most_strings: int = 19

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, LEAST, "states", "symbols")
        at_least(self, 1, "edges", "string", "least_strings")
        at_least(self, self.least_strings, "most_strings", hint=", which is least_strings")
        if self.edges >= LEAST:
            raise ValueError(f"edges is {self.edges}, and the smallest automaton has {LEAST} states; use {LEAST - 1}")

    def refuse(self, length: int, vocab_size: int, named: str = "sequence_length") -> None:
        if length < 2:
            raise ValueError(f"regular_languages takes a {named} of at least 2, not {length}")
        if vocab_size < FIRST + self.symbols:
            raise ValueError(
                f"regular_languages with symbols={self.symbols} takes a vocab_size of at least {FIRST + self.symbols}, "
                f"not {vocab_size}"
            )

    def draw(self, random: np.random.Generator, length: int, vocab_size: int, held_out: bool) -> Example:
        automaton = self.automaton(random, held_out)
        text, states = [], []
        for _ in range(random.integers(self.least_strings, self.most_strings + 1)):
            symbols, before = automaton.walk(random, int(random.integers(1, self.string + 1)))
            text += [FIRST + symbol for symbol in symbols] + [SEPARATOR]
            states += [*before, -1]
        text, states = text[: length + 1], states[: length + 1]
        tokens_T = np.full(length, PADDING, dtype=np.int64)
        targets_T = np.full(length, IGNORE, dtype=np.int64)
        tokens_T[: len(text)] = text[:length]
        legal_TV = np.zeros((length, vocab_size), dtype=bool)
        for place, (token, state) in enumerate(zip(text[1:], states[1:], strict=True)):
            if state >= 0:
                targets_T[place] = token
                legal_TV[place, [FIRST + symbol for symbol, _ in automaton.states[state]]] = True
        return Strings(tokens_T, targets_T, legal_TV=legal_TV)

    def automaton(self, random: np.random.Generator, held_out: bool) -> Automaton:
        """Which side an automaton is on is a function of its language, so that no language is on both."""
        while True:
            automaton = random_automaton(random, Sizes(self.states, self.symbols, self.edges))
            digest = hashlib.blake2b(repr(automaton.states).encode(), digest_size=8).digest()
            if (int.from_bytes(digest, "big") % HELD_OUT == 0) == held_out:
                return automaton

    def measure(self, logits_TV: Tensor, example: Example) -> dict[str, tuple[float, float]]:
        """How often the likeliest symbol is legal, and half the sum of |p_model - p_automaton|, both per token."""
        assert isinstance(example, Strings)
        asked_T = torch.from_numpy(example.targets_T != IGNORE)
        p_TV = upcast(logits_TV.cpu()[asked_T]).softmax(-1)
        legal_TV = torch.from_numpy(example.legal_TV)[asked_T]
        right = legal_TV.gather(1, p_TV.argmax(-1, keepdim=True)).sum()
        uniform_TV = legal_TV.to(p_TV.dtype) / legal_TV.sum(-1, keepdim=True)
        count = float(asked_T.sum())
        variation = (p_TV - uniform_TV).abs().sum() / 2
        return {"accuracy": (float(right), count), "total_variation": (float(variation), count)}
