"""What expert parallelism sends and multiplies: the picks of FFN experts, once, and no others."""

import dataclasses
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from configs.structure import instantiate, to_plain
from models.config import LMConfig
from models.ffn import experts
from models.ffn.moe_plus_plus import MoEPlusPlusConfig
from models.kernels.grouped_mm import grouped_mm
from parallel import check, expert
from parallel.collectives import all_to_all
from parallel.engine import Engine
from parallel.mesh import Mesh, MeshConfig, Ranks
from parallel.testing import Pool
from tests.contract.tiny import build

SETTINGS = check.Settings(length=16, packed=False)  # without padding, whose picks no statistic counts
PRODUCTS, WAYS = 3, 2  # a row's, and those of the exchanges: to its expert and back


@dataclasses.dataclass
class Rows:
    """sent: rows that entered an exchange, their own rank's included. multiplied: rows of matrix products."""

    sent: int = 0
    multiplied: int = 0

    def exchange(self, x: Tensor, receive: list[int], send: list[int], ranks: Ranks) -> Tensor:
        assert sum(send) == len(x)
        self.sent += len(x)
        return all_to_all(x, receive, send, ranks)

    def product(self, a_MK: Tensor, b_EKN: Tensor, counts_E: Tensor) -> Tensor:
        self.multiplied += len(a_MK)
        return grouped_mm(a_MK, b_EKN, counts_E)


def step(plain: dict[str, Any], mesh_config: MeshConfig) -> tuple[Rows, dict[str, Tensor]]:
    """This rank's rows in the forward passes of a step, and the statistics of all ranks."""
    config, mesh, rows = instantiate(LMConfig, plain), Mesh(mesh_config), Rows()
    count = check.micro_batches(mesh_config, SETTINGS)
    batch = check.share(check.make_batch(config, mesh_config, SETTINGS), count, mesh.data_rank, mesh.data_size)
    engine = Engine(config, mesh, seed=0, dtype=torch.float64)
    engine.load_full_state(check.shaken(engine.full_state(), 0))
    exchanged = mock.patch.object(expert, "all_to_all", rows.exchange)
    with exchanged, mock.patch.object(experts, "grouped_mm", rows.product):
        out = engine.step_gradients(batch, count)
    return rows, out.stats


@pytest.mark.parametrize("capacity", [None, 0.8])
@pytest.mark.parametrize("mesh", ["dp=2,ep=2", "tp=2,ep=2"])
def test_only_picks_of_ffn_experts_travel(mesh: str, capacity: float | None, pool: Pool) -> None:
    ffn = MoEPlusPlusConfig(4, 8, tau=0.5, capacity_factor=capacity)
    config, mesh_config = build(ffn=to_plain(ffn)), MeshConfig.parse(mesh)
    found = pool.run(step, mesh_config.world_size, to_plain(config), mesh_config)
    stats = found[0][1]
    loads = [load for name, load in stats.items() if name.endswith("expert_load")]
    late = [dropped for name, dropped in stats.items() if name.endswith("expert_dropped")]
    tokens = check.make_batch(config, mesh_config, SETTINGS).tokens.numel()
    assert sum(int(load.sum()) for load in loads) == tokens * ffn.top_k * len(config.expanded)
    assert len(late) == (len(config.expanded) if capacity else 0)
    kept = sum(int(load[: ffn.num_experts].sum()) for load in loads)
    kept -= sum(int(dropped[: ffn.num_experts].sum()) for dropped in late)
    assert 0 < kept < 0.8 * tokens * ffn.top_k * len(config.expanded)
    assert sum(rows.sent for rows, _ in found) == WAYS * kept
    assert sum(rows.multiplied for rows, _ in found) == PRODUCTS * kept
