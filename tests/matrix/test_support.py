"""The support table, and that what it is made of is complete."""

import dataclasses
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from parallel import check
from parallel.engine import Engine
from parallel.mesh import SCHEDULES, Mesh, MeshConfig
from tests.matrix import cells, covering, support
from tests.matrix.cells import COMBINATION, Cell
from tests.matrix.code import PACKAGES, Versions
from tests.matrix.meshes import MESHES, family
from tests.matrix.records import Book, Record, read

ROOT = Path(__file__).parents[2]
ROW = tuple((slot, kinds[0]) for slot, kinds in covering.kinds().items())
APART = {(("residual", "hyper"), ("shortcut", "laurel")): "laurel needs one path; use none"}
LINE = " ".join(kind for _, kind in ROW)


def records() -> dict[Cell, Record]:
    """Of every cell: all equal but for one refusal."""
    found = {cell: Record(cell, "equal", cell.mesh, 2e-14) for cell in cells.on_meshes()}
    refused = Cell("ffn", "swiglu", "ep=2")
    found[refused] = Record(refused, "refused", "ep=2", reason="ep is 2 and the model has no experts; use ep=1")
    combination = Cell(COMBINATION, LINE, "")
    return {**found, combination: Record(combination, "equal", "tp=2", 1e-15)}


def columns(text: str) -> dict[str, list[list[str]]]:
    """The tables of a page by their heading: rows of cells."""
    parts = re.findall(r"^## (\w+)\n\n((?:\|.*\n)+)", text, re.MULTILINE)
    return {name: [[x.strip() for x in line.split("|")[1:-1]] for line in body.splitlines()] for name, body in parts}


def names_all(text: str) -> bool:
    """Whether a page has exactly the kinds and meshes of the code."""
    tables = columns(text)
    kinds = {name: ["mesh", *slot.kinds()] for name, slot in cells.TABLES.items()}
    meshes = [f"`{mesh}`" for mesh in MESHES]
    return {name: rows[0] for name, rows in tables.items()} == kinds and all(
        [row[0] for row in rows[2:]] == meshes for rows in tables.values()
    )


def test_the_page() -> None:
    text = support.page(records(), [ROW], APART)
    assert names_all(text)
    rows = columns(text)["ffn"]
    at = {row[0]: dict(zip(rows[0], row, strict=True)) for row in rows}
    assert at["`ep=2`"]["swiglu"] == "(1)" and at["`ep=2`"]["moe"] == "2e-14"
    assert "\n1. ep is 2 and the model has no experts; use ep=1\n2. laurel needs one path; use none\n" in text
    assert "- residual hyper beside shortcut laurel: (2)" in text
    assert f"| 1 of {len(covering.kinds()['mixer']) * len(covering.kinds()['ffn'])} |" in text
    assert f"{len(records()) - 1} cells equal, 1 refused" in text


def test_a_page_without_a_kind_or_a_mesh_is_stale() -> None:
    text = support.page(records(), [ROW], APART)
    assert not names_all(text.replace("| mla |", "| mlb |"))
    assert not names_all(text.replace("| `tp=4` |", "| `tp=8` |"))


def test_a_hole_is_named() -> None:
    missing = Cell("mixer", "mla", "tp=2")
    found = {cell: record for cell, record in records().items() if cell != missing}
    expected = rf"^1 of {len(records())} cells have no record of their code, mixer-mla-tp=2 for one$"
    with pytest.raises(support.Holes, match=expected):
        support.page(found, [ROW], APART)


def test_what_is_wrong_is_no_support() -> None:
    cell = Cell("mixer", "mla", "tp=2")
    found = {**records(), cell: Record(cell, "wrong", "tp=2", reason="gradient of embed.weight: 1e-03 > 1e-09")}
    with pytest.raises(support.Holes, match=r"mixer-mla-tp=2 on tp=2: gradient of embed\.weight: 1e-03"):
        support.page(found, [ROW], APART)


def test_without_records_nothing_is_written(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.matrix.support", str(tmp_path), str(tmp_path / "support.md")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 1 and not list(tmp_path.iterdir())
    assert "cells have no record of their code" in done.stderr and "`make support` goes on" in done.stderr


@pytest.mark.skipif(not (ROOT / "docs" / "support.md").exists(), reason="the page has not been written yet")
def test_the_page_of_the_docs_is_of_these_kinds_and_meshes() -> None:
    assert names_all((ROOT / "docs" / "support.md").read_text()), "write it again with make support"


@pytest.fixture(scope="module")
def versions() -> Versions:
    return Versions()


def test_records_come_back(tmp_path: Path, versions: Versions) -> None:
    """The latest of this code, without the line that was being written when a process ended."""
    cell, other = Cell("mixer", "mla", "tp=2"), Cell("mixer", "mla", "tp=4")
    first, second = Book(tmp_path / "new", versions), Book(tmp_path / "new", versions)
    first.add(Record(cell, "wrong", "tp=2", reason="loss", at=1.0))
    second.add(Record(other, "equal", "tp=4", 1e-14, at=2.0))
    assert not Book(tmp_path / "new", versions).has(cell), "what was wrong is tried again"
    second.add(Record(cell, "equal", "tp=2", 1e-15, at=3.0))
    with first.file.open("a") as out:
        out.write(json.dumps(dataclasses.asdict(Record(other, "wrong", "tp=4", code="another", at=4.0))) + "\n")
        out.write(json.dumps({"cell": {"table": "mixer"}})[:20])
    book = Book(tmp_path / "new", versions)
    assert len(read(tmp_path / "new")) == 3
    assert {cell: record.error for cell, record in book.of([cell, other]).items()} == {cell: 1e-15, other: 1e-14}
    assert book.has(cell) and book.has(other)


DEPENDENT = {
    # A mixer, a memory that needs others, an optimiser, and a model that has most of its parts from plug-ins.
    Cell("mixer", "gated_deltanet", "tp=2"): ("models.mixers.mla", "models.residual.hyper"),
    Cell("memory", "pareprop", "tp=2"): ("models.memory.offload", "models.mixers.rg_lru"),
    Cell("optim", "muon", "tp=2"): ("trainer.optim.sgd", "models.mixers.rg_lru"),
    Cell(COMBINATION, LINE, ""): ("models.ffn.moe_plus_plus", "models.residual.reversible"),
}


@pytest.mark.parametrize("cell", DEPENDENT, ids=str)
def test_what_a_cell_depends_on(cell: Cell, versions: Versions) -> None:
    """All modules that run in its step, and no plug-in that its model lacks."""
    config, kind = cells.parts(cell)
    settings = check.Settings() if kind is None else cells.trial(cell).settings
    batch = check.make_batch(config, MeshConfig(), settings)
    ran = set()
    sys.setprofile(lambda frame, event, argument: ran.add(frame.f_globals.get("__name__", "")))
    try:
        engine = Engine(config, Mesh.single(), seed=0, dtype=settings.dtype, memory=settings.memory)
        check.take_step(engine, batch, 1, None, settings)
    finally:
        sys.setprofile(None)
    behind = versions.behind_cell(cell)
    assert {name for name in ran if name.split(".")[0] in PACKAGES} - {__name__} <= behind
    assert behind.isdisjoint(DEPENDENT[cell])


@pytest.mark.parametrize(
    "parts",
    [
        *({name} for name in ("dp", "fsdp", "hsdp", "tp", "cp-ulysses", "cp-ring", "ep", "etp", "pp")),
        *({"pp", schedule} for schedule in SCHEDULES if schedule != "1f1b"),
        {"tp", "pp"},
        {"fsdp", "tp"},
        {"ep", "pp"},
        {"cp-ulysses", "tp"},
        {"cp-ring", "tp"},
        {"fsdp", "tp", "pp"},
        {"ep", "tp"},
    ],
    ids=lambda parts: "+".join(sorted(parts)),
)
def test_meshes_of_every_class(parts: set[str]) -> None:
    assert parts in [family(MeshConfig.parse(mesh)) for mesh in MESHES]


def test_a_covering_array() -> None:
    """Every pair but those that are apart, no three that is, and not many more models than the two largest slots ask
    for."""
    factors = {"a": list("12345"), "b": list("123"), "c": list("1234"), "d": list("12")}
    apart = {(("a", "1"), ("b", "2")): "no", (("a", "2"), ("c", "1"), ("d", "1")): "no"}
    rows = covering.cover(factors, apart)
    found = {part for row in rows for size in (2, 3) for part in itertools.combinations(row, size)}
    assert {pair for pair in covering.every_pair(factors) if pair not in found} == {(("a", "1"), ("b", "2"))}
    assert found.isdisjoint(apart) and all([slot for slot, _ in row] == list(factors) for row in rows)
    assert 20 <= len(rows) <= 24


def test_unknown_refusals_are_failures() -> None:
    assert cells.may_be_refused("ep is 2 and the model has no experts; use ep=1")
    assert not cells.may_be_refused("tp is 4, which does not divide the 2 heads of mixer; use tp=2")
