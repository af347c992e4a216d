"""On a grid, undone layers give the very gradients of keeping all: the last bit of every one."""

from typing import Any

import pytest
import torch

from models.config import LMConfig
from models.memory.none import NoneConfig
from models.memory.pareprop import PaRepropConfig
from models.memory.reversible import ReversibleConfig
from tests.contract.tiny import HYBRID, build
from tests.parallel.test_memory import step
from tests.slow import slow

ON_GRID: dict[str, dict[str, Any]] = {
    "reversible": {"kind": "reversible"},
    "midpoint": {"kind": "midpoint"},
    "midpoint_smoothed": {"kind": "midpoint_smoothed"},
    **{f"split{count}": {"kind": "multi_split", "streams": count} for count in (2, 3, 5)},
}


def refuse_differing_bits(config: LMConfig, dtype: torch.dtype) -> None:
    """What is rebuilt is what was there, and its gradients are added up in one order: none differs in a bit."""
    plain = step(config, NoneConfig(), dtype)
    for kept in (ReversibleConfig(), PaRepropConfig()):
        found = step(config, kept, dtype)
        assert plain.loss == found.loss
        differing = [name for name, x in plain.gradients.items() if not torch.equal(found.gradients[name], x)]
        assert not differing, (kept.kind, len(differing), len(plain.gradients))


@pytest.mark.parametrize("residual", ["reversible", *slow(["midpoint", "split3"])])
def test_bit_for_bit_on_a_grid_at_depth_96(residual: str) -> None:
    refuse_differing_bits(build(pattern="A", repeat=96, residual={**ON_GRID[residual], "grid_bits": 14}), torch.float32)


@pytest.mark.parametrize("depth", [1, 2, 3, 8])
@pytest.mark.parametrize("residual", ON_GRID)
def test_bit_for_bit_at_odd_and_even_depths(residual: str, depth: int) -> None:
    config = build(pattern="A", repeat=depth, residual={**ON_GRID[residual], "grid_bits": 14})
    refuse_differing_bits(config, torch.float32)


@pytest.mark.parametrize("norm", ["pre", "peri", "post"])
@pytest.mark.parametrize("residual", ON_GRID)
def test_bit_for_bit_beside_bfloat16_branches(residual: str, norm: str) -> None:
    config = build(**HYBRID, residual={**ON_GRID[residual], "grid_bits": 14}, values="resformer", norm=norm)
    refuse_differing_bits(config, torch.bfloat16)
