"""What became of each cell: a line of JSON each, in a file per process, so that a sweep can be done in parts.

A line is written as soon as its cell is done, and counts for the code that it was measured on alone.
"""

import dataclasses
import hashlib
import json
import time
import uuid
from pathlib import Path

import torch

from tests.matrix.cells import Cell

ROOT = Path(__file__).parents[2]
# Folders and files whose change may change what becomes of a cell.
CODE = (
    "configs",
    "models",
    "parallel",
    "trainer/optim",
    "tests/contract/tiny.py",
    "tests/matrix/cells.py",
    "tests/matrix/covering.py",
)
OUTCOMES = ("equal", "refused", "wrong")


@dataclasses.dataclass(frozen=True)
class Record:
    """outcome: equal, refused or wrong. mesh: that it was tried on. error: the worst of any gradient, relative to its
    largest element. reason: of a refusal, or what was wrong. seconds: that it took. at: when it ended, since 1970."""

    cell: Cell
    code: str
    outcome: str
    mesh: str
    error: float = 0.0
    reason: str = ""
    seconds: float = 0.0
    at: float = dataclasses.field(default_factory=time.time)


def code_version() -> str:
    """Of all that cells depend on, torch included: 12 hexadecimal digits."""
    digest = hashlib.sha256(torch.__version__.encode())
    for name in CODE:
        place = ROOT / name
        for file in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
            digest.update(file.relative_to(ROOT).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def read(folder: Path, code: str) -> dict[Cell, Record]:
    """The latest record of each cell that was measured on this code.

    A line that an interrupted process left unfinished is passed over: its cell has not been done.
    """
    found: dict[Cell, Record] = {}
    for file in sorted(folder.glob("*.jsonl")):
        for line in file.read_text().splitlines():
            try:
                data = json.loads(line)
            except json.JSONDecodeError:
                continue
            record = Record(**{**data, "cell": Cell(**data["cell"])})
            if record.code == code and (record.cell not in found or found[record.cell].at < record.at):
                found[record.cell] = record
    return found


class Book:
    """A folder of records, that this process reads once and adds to a file of its own."""

    def __init__(self, folder: Path) -> None:
        self.code = code_version()
        self.done = read(folder, self.code)
        self.file = folder / f"{uuid.uuid4().hex}.jsonl"

    def has(self, cell: Cell) -> bool:
        """Whether it need not be tried again."""
        return cell in self.done and self.done[cell].outcome != "wrong"

    def add(self, record: Record) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a") as out:
            out.write(json.dumps(dataclasses.asdict(record)) + "\n")
