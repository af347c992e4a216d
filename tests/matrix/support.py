"""The support table: `python -m tests.matrix.support RECORDS PAGE` writes it from what the sweep wrote down.

Kinds and meshes are those of the code, and every cell needs a record: without one the page is not written.
"""

import itertools
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch

from tests.matrix import cells, covering
from tests.matrix.cells import Cell
from tests.matrix.code import Versions
from tests.matrix.covering import Choices
from tests.matrix.meshes import MESHES
from tests.matrix.records import OUTCOMES, Book, Record

INTRODUCTION = """# What equals one process, on which mesh

Written by `make support` alone, from the records of its sweep: {equal} cells equal, {refused} refused. Each was tried
on the code that it depends on as it was when this was written (torch {torch}).

A number says that an optimiser step of a small model with the kind equals one process's in float64: it is the worst
error of any parameter's gradient, relative to its largest element (`weft check` lists all else that is compared, and
the tolerances). Each step has packed documents, padding, uneven numbers of tokens, at least two micro-batches and
clipping; under routers experts drop tokens. A number in parentheses is the reason, at the end of the page, why it is
refused.

On meshes with expert ranks kinds of other slots stand beside `moe`, and with `overlap=true` beside the ladder residual.
Memories, optimisers and sparse training are tried on layers of gated DeltaNet and attention with experts, reversible
streams, value residuals, stochastic depth and tied embeddings; sparse training for two updates.
"""
PAIRS = """## Combinations

{models} models of four layers hold every pair of kinds of two slots that may meet. Each is compared on the mesh whose
turn it is, or the next one that takes it. How many of all pairs are in a model that equals one process:
"""


class Holes(Exception):
    """The cells that keep the page from being written, with the way out."""


class Notes:
    """Reasons, numbered as they come up."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def number(self, reason: str) -> int:
        return self.numbers.setdefault(reason, len(self.numbers) + 1)

    def lines(self) -> list[str]:
        return [f"{number}. {reason}" for reason, number in self.numbers.items()]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def on_meshes(found: Mapping[Cell, Record], notes: Notes) -> list[str]:
    """A section for each slot: meshes down, kinds across."""

    def text(cell: Cell) -> str:
        record = found[cell]
        return f"{record.error:.0e}" if record.outcome == "equal" else f"({notes.number(record.reason)})"

    lines = []
    for name, slot in cells.TABLES.items():
        kinds = list(slot.kinds())
        rows = [[f"`{mesh}`", *(text(Cell(name, kind, mesh)) for kind in kinds)] for mesh in MESHES]
        lines += [f"## {name}", "", *table(["mesh", *kinds], rows), ""]
    return lines


def pairs(rows: Sequence[Choices], apart: Mapping[Choices, str], notes: Notes) -> list[str]:
    """A section on the models of the covering array: for any two slots how many pairs are in one, and why not all."""
    every = Counter((a[0], b[0]) for a, b in covering.every_pair(covering.kinds()))
    equal = Counter((a[0], b[0]) for a, b in {pair for row in rows for pair in itertools.combinations(row, 2)})
    slots = list(covering.kinds())
    body = [[a, *(f"{equal[a, b]} of {every[a, b]}" if (a, b) in every else "" for b in slots[1:])] for a in slots[:-1]]
    lines = [PAIRS.format(models=len(rows)), *table(["", *slots[1:]], body), ""]
    # One line for the kinds of a slot that are refused beside the same others; each reason names one of them.
    groups: dict[Choices, list[tuple[str, str]]] = {}
    for (first, *others), reason in apart.items():
        groups.setdefault(tuple(others), []).append((f"{first[0]} {first[1]}", reason))
    for others, refused in groups.items():
        beside = " and ".join(f"{slot} {kind}" for slot, kind in others)
        lines.append(f"- {', '.join(name for name, _ in refused)} beside {beside}: ({notes.number(refused[0][1])})")
    return [*lines, ""]


def check_all(found: Mapping[Cell, Record], due: Sequence[Cell]) -> None:
    """Raise Holes where a cell has no record, or one that says that it is wrong."""
    if missing := [cell for cell in due if cell not in found]:
        raise Holes(f"{len(missing)} of {len(due)} cells have no record of their code, {missing[0]} for one")
    if wrong := [found[cell] for cell in due if found[cell].outcome == "wrong"]:
        reasons = "\n".join(f"{record.cell} on {record.mesh}: {record.reason}" for record in wrong)
        raise Holes(f"{len(wrong)} of {len(due)} cells are wrong:\n{reasons}\nMend them")


def page(found: Mapping[Cell, Record], rows: Sequence[Choices], apart: Mapping[Choices, str]) -> str:
    """The whole page. Raises Holes."""
    due = [*cells.on_meshes(), *cells.combinations(rows)]
    check_all(found, due)
    counted = Counter(found[cell].outcome for cell in due)
    notes = Notes()
    lines = [
        INTRODUCTION.format(torch=torch.__version__, **{outcome: counted[outcome] for outcome in OUTCOMES}),
        *on_meshes(found, notes),
        *pairs(rows, apart, notes),
        "## Why it is refused",
        "",
        *notes.lines(),
    ]
    return "\n".join(lines) + "\n"


def main(folder: str, to: str) -> None:
    book = Book(Path(folder), Versions())
    try:
        # First without the combinations, which take some ten seconds to find.
        check_all(book.of(cells.on_meshes()), cells.on_meshes())
        rows, apart = covering.array()
        text = page(book.of([*cells.on_meshes(), *cells.combinations(rows)]), rows, apart)
    except Holes as holes:
        sys.exit(f"{to} is not written: {holes}; `make support` goes on where it stopped")
    Path(to).write_text(text)


if __name__ == "__main__":
    main(*sys.argv[1:])
