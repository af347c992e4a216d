"""The whole matrix: every cell of the support table, and models that hold every pair of kinds; see `make support`."""

import dataclasses
import time

import pytest

from models.slots import MixerConfig, ResidualConfig
from parallel import check
from parallel.mesh import MeshConfig
from parallel.testing import Pool
from tests.contract.tiny import describe
from tests.matrix import cells, covering
from tests.matrix.cells import Cell
from tests.matrix.records import Book, Record


def tried(cell: Cell, pool: Pool) -> Record:
    """What becomes of it."""
    try:
        trial = cells.trial(cell)
        trial.refuse()
    except ValueError as error:
        expected = cells.may_be_refused(str(error))
        return Record(cell, "refused" if expected else "wrong", cell.mesh, reason=str(error))
    try:
        report = check.run(trial.config, MeshConfig.parse(trial.mesh), trial.settings, pool, timeout=120)
    except Exception as error:
        return Record(cell, "wrong", trial.mesh, reason=f"{type(error).__name__}: {error}")
    if report.ok:
        return Record(cell, "equal", trial.mesh, max(report.gradients.values()))
    wrong = [describe(trial.config), f"on {trial.mesh}", *report.wrong[:10]]
    return Record(cell, "wrong", trial.mesh, reason="\n".join(wrong))


def hold(cell: Cell, pool: Pool, book: Book | None) -> None:
    """Try a cell unless it has been, and write down what became of it."""
    if book is not None and book.has(cell):
        pytest.skip("on record")
    start = time.monotonic()
    record = tried(cell, pool)
    if book is not None:
        book.add(dataclasses.replace(record, seconds=time.monotonic() - start))
    assert record.outcome != "wrong", record.reason


@pytest.mark.slow
@pytest.mark.parametrize("cell", cells.on_meshes(), ids=str)
def test_every_kind_on_every_mesh(cell: Cell, pool: Pool, book: Book | None) -> None:
    hold(cell, pool, book)


@pytest.mark.slow
@pytest.mark.parametrize("residual", ResidualConfig.kinds())
@pytest.mark.parametrize("mixer", MixerConfig.kinds())
def test_every_pair_of_kinds(mixer: str, residual: str, pool: Pool, book: Book | None) -> None:
    """The models of the covering array that have these two, each on the mesh whose turn it is."""
    rows = [row for row in covering.array()[0] if {("mixer", mixer), ("residual", residual)} <= set(row)]
    if not rows:
        pytest.skip("these two may not meet")
    for cell in cells.combinations(rows):
        hold(cell, pool, book)
