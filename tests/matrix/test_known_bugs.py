"""The matrix sees what others shipped: every planted bug turns its check red."""

import functools

import pytest

from parallel import check
from parallel.mesh import MeshConfig
from parallel.testing import Pool
from tests.contract.tiny import build
from tests.matrix.plants import plant, run_planted
from tests.matrix.test_matrix import COMBINATIONS

CONFIGS = {**COMBINATIONS, "plain": build()}


@pytest.mark.parametrize("name", plant.plants)
def test_planted_bug_is_seen(name: str, pool: Pool) -> None:
    _, config, mesh = plant.plants[name]
    task = functools.partial(run_planted, name)
    report = check.run(CONFIGS[config], MeshConfig.parse(mesh), pool=pool, task=task)
    assert not report.ok


@pytest.mark.parametrize("mesh", sorted({mesh for _, _, mesh in plant.plants.values()}))
def test_nothing_is_seen_without_one(mesh: str, pool: Pool) -> None:
    """The same checks are green before a bug is planted, and after it is pulled out again."""
    for config in sorted({config for _, config, m in plant.plants.values() if m == mesh}):
        report = check.run(CONFIGS[config], MeshConfig.parse(mesh), pool=pool)
        assert report.ok, report.wrong
