"""Random deterministic automata of which every state accepts, as small and as canonical as can be."""

import dataclasses
from typing import NamedTuple

import numpy as np

Edges = tuple[tuple[int, int], ...]  # (symbol, next state), by symbol


class Sizes(NamedTuple):
    """The most of each; the least is 4 states, 4 symbols and 1 edge of a state."""

    states: int
    symbols: int
    edges: int


@dataclasses.dataclass(frozen=True)
class Automaton:
    """states[i]: the edges of state i. State 0 is the first; states are numbered in breadth-first order by symbol, so
    that equal languages have equal automata."""

    states: tuple[Edges, ...]

    def walk(self, random: np.random.Generator, length: int) -> tuple[list[int], list[int]]:
        """Symbols of a random walk, and the state before each."""
        symbols, states, state = [], [], 0
        for _ in range(length):
            states.append(state)
            symbol, state = self.states[state][random.integers(len(self.states[state]))]
            symbols.append(symbol)
        return symbols, states


def random_automaton(random: np.random.Generator, most: Sizes) -> Automaton:
    """Each state has edges with distinct symbols to distinct other states (Akyurek et al., arXiv 2401.12973)."""
    count = int(random.integers(4, most.states + 1))
    alphabet = random.choice(most.symbols, int(random.integers(4, most.symbols + 1)), replace=False)
    table: list[dict[int, int]] = []
    for state in range(count):
        edges = int(random.integers(1, most.edges + 1))
        others = np.delete(np.arange(count), state)
        symbols, targets = random.choice(alphabet, edges, replace=False), random.choice(others, edges, replace=False)
        table.append(dict(zip(symbols.tolist(), targets.tolist(), strict=True)))
    return canonical(table, minimal(table))


def minimal(table: list[dict[int, int]]) -> list[int]:
    """The class of each state, equal where no string tells two apart (Moore's refinement)."""
    classes = [0] * len(table)
    while True:
        signatures = [
            (own, *sorted((s, classes[t]) for s, t in row.items())) for own, row in zip(classes, table, strict=True)
        ]
        numbers: dict[tuple, int] = {}
        refined = [numbers.setdefault(signature, len(numbers)) for signature in signatures]
        if len(numbers) == len(set(classes)):
            return refined
        classes = refined


def canonical(table: list[dict[int, int]], classes: list[int]) -> Automaton:
    """The classes that can be reached, in breadth-first order."""
    rows = {own: row for own, row in zip(classes, table, strict=True)}
    order = [classes[0]]
    for own in order:
        for _, target in sorted(rows[own].items()):
            if classes[target] not in order:
                order.append(classes[target])
    number = {own: index for index, own in enumerate(order)}
    return Automaton(tuple(tuple((s, number[classes[t]]) for s, t in sorted(rows[own].items())) for own in order))
