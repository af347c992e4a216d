"""What became of each cell: a line of JSON each, in a file per process, so that a sweep can be done in parts.

A line is written as soon as its cell is done, and counts as long as the code that the cell depends on is the same.
"""

import dataclasses
import json
import time
import uuid
from collections.abc import Iterable
from pathlib import Path

from tests.matrix.cells import Cell
from tests.matrix.code import Versions

OUTCOMES = ("equal", "refused", "wrong")


@dataclasses.dataclass(frozen=True)
class Record:
    """outcome: equal, refused or wrong. mesh: that it was tried on. error: the worst of any gradient, relative to its
    largest element. reason: of a refusal, or what was wrong. code: the version that it was measured on. seconds: that
    it took. at: when it ended, since 1970."""

    cell: Cell
    outcome: str
    mesh: str
    error: float = 0.0
    reason: str = ""
    code: str = ""
    seconds: float = 0.0
    at: float = dataclasses.field(default_factory=time.time)


def read(folder: Path) -> dict[tuple[Cell, str], Record]:
    """The latest record of each cell and version of its code.

    A line that an interrupted process left unfinished is passed over: its cell has not been done.
    """
    found: dict[tuple[Cell, str], Record] = {}
    for file in sorted(folder.glob("*.jsonl")):
        for line in file.read_text().splitlines():
            try:
                data = json.loads(line)
            except json.JSONDecodeError:
                continue
            record = Record(**{**data, "cell": Cell(**data["cell"])})
            key = record.cell, record.code
            if key not in found or found[key].at < record.at:
                found[key] = record
    return found


class Book:
    """A folder of records, that this process reads once and adds to a file of its own."""

    def __init__(self, folder: Path, versions: Versions) -> None:
        self.versions = versions
        self.done = read(folder)
        self.file = folder / f"{uuid.uuid4().hex}.jsonl"

    def of(self, cells: Iterable[Cell]) -> dict[Cell, Record]:
        """Those that were measured on the code as it is."""
        keys = {cell: (cell, self.versions.of(cell)) for cell in cells}
        return {cell: self.done[key] for cell, key in keys.items() if key in self.done}

    def has(self, cell: Cell) -> bool:
        """Whether it need not be tried again."""
        return any(record.outcome != "wrong" for record in self.of([cell]).values())

    def add(self, record: Record) -> None:
        """Write a record down, whose `code` is filled in."""
        record = dataclasses.replace(record, code=self.versions.of(record.cell))
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a") as out:
            out.write(json.dumps(dataclasses.asdict(record)) + "\n")
