"""The matrix sees what others shipped: every planted bug turns its check red."""

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from configs.structure import instantiate
from models.memory.base import MemoryConfig
from parallel import check
from parallel.mesh import MeshConfig
from parallel.testing import Pool
from tests.contract.tiny import HYBRID, build
from tests.matrix.known_bugs import BUGS
from tests.matrix.plants import Place, plant, run_planted
from tests.matrix.test_matrix import COMBINATIONS

ROOT = Path(__file__).parents[2]
CONFIGS = {
    **COMBINATIONS,
    "plain": build(),
    "latent": build(mixer="mla"),
    "undone": build(**HYBRID, residual="reversible"),
}


def report_of(place: Place, pool: Pool, task: Callable[..., dict[str, Any]] = check.run_rank) -> check.Report:
    kept = instantiate(MemoryConfig, {"kind": place.memory})
    settings = check.Settings(memory=kept)
    return check.run(CONFIGS[place.config], MeshConfig.parse(place.mesh), settings, pool, task=task)


@pytest.mark.parametrize("name", plant.plants)
def test_planted_bug_is_seen(name: str, pool: Pool) -> None:
    assert not report_of(plant.plants[name][1], pool, functools.partial(run_planted, name)).ok


@pytest.mark.parametrize("place", sorted({place for _, place in plant.plants.values()}), ids="-".join)
def test_nothing_is_seen_without_one(place: Place, pool: Pool) -> None:
    """The same checks are green before a bug is planted, and after it is pulled out again."""
    report = report_of(place, pool)
    assert report.ok, report.wrong


def test_every_known_bug_is_looked_for() -> None:
    """By a plant or a test that is there, or there is a reason why nothing can; and no plant is of an unknown bug."""
    named = [name for bug in BUGS for name in bug.seen_by]
    tests = {name for name in named if "::" in name}
    assert {name for name in named if name not in tests} == plant.plants.keys()
    for name in tests:
        file, _, function = name.partition("::")
        assert re.search(rf"^def {function}\(", (ROOT / file).read_text(), re.MULTILINE), name
    assert all(bool(bug.seen_by) != bool(bug.absent) for bug in BUGS)
