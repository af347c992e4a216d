"""What expert parallelism sends and multiplies: the picks of FFN experts, once, and no others."""

import dataclasses
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from configs.structure import instantiate, to_plain
from models.config import LMConfig
from models.ffn.moe_plus_plus import MoEPlusPlusConfig
from models.kernels.grouped_mm import GroupedMM, grouped_mm
from models.kernels.op import ops_of
from parallel import check
from parallel.engine import Engine
from parallel.exchange import Direct, TwoLevel
from parallel.expert import SpreadDispatch, dispatch
from parallel.in_flight import Flight
from parallel.mesh import Mesh, MeshConfig
from parallel.testing import Pool
from tests.contract.tiny import HYBRID, build
from tests.parallel.order import Computed, beside, flights

SETTINGS = check.Settings(length=16, packed=False)  # without padding, whose picks no statistic counts
LAUNCH = Flight.forth
PRODUCTS, WAYS = 3, 2  # a row's, and those of the exchanges: to its expert and back


@dataclasses.dataclass
class Rows:
    """sent: rows that entered an exchange, their own rank's included. multiplied: rows of matrix products."""

    sent: int = 0
    multiplied: int = 0

    def launch(self, flight: Flight, x: Tensor) -> None:
        self.sent += len(x)
        LAUNCH(flight, x)

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
    for model in engine.models:
        for op in ops_of(model).get(GroupedMM.name, ()):
            op.call = rows.product
    with mock.patch.object(Flight, "forth", lambda flight, x: rows.launch(flight, x)):
        out = engine.step_gradients(batch, count)
    return rows, out.stats


@pytest.mark.parametrize("capacity", [None, 0.8])
@pytest.mark.parametrize("mesh", ["dp=2,ep=2", "tp=2,ep=2", "dp=2,ep=2,ep_chunks=3"])
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


def routed(seed: int) -> list[Tensor]:
    """What two ways of exchange bring to this rank and back, and their gradients; some ranks have no rows."""
    mesh = Mesh(MeshConfig(dp=8, ep=8, ep_local=2))
    generator = torch.Generator().manual_seed(10 * seed + mesh.rank)
    rows = int(torch.randint(0, 12, (), generator=generator)) * (mesh.rank % 3 > 0)
    expert_M = torch.randint(0, 24, (rows,), generator=generator)
    found = []
    for exchange in (Direct(mesh.ep), TwoLevel(mesh.near_experts, mesh.far_experts)):
        x_MD = torch.randn(rows, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(mesh.rank))
        x_MD.requires_grad_()
        spread = SpreadDispatch(exchange, 1 + seed)
        y_PD, places_M1 = spread(x_MD, expert_M[:, None], None, Scaled(3, mesh.rank))
        y_MD = y_PD[places_M1.squeeze(1)]
        y_MD.sum().backward()
        assert x_MD.grad is not None
        expected = x_MD * (1 + expert_M[:, None])
        assert torch.equal(y_MD, expected) and torch.equal(x_MD.grad, (1 + expert_M[:, None]).expand_as(x_MD).double())
        found.append(y_MD.detach())
    return found


class Scaled:
    """Experts that multiply by one more than their number."""

    def __init__(self, num_local: int, rank: int) -> None:
        self.num_local, self.first = num_local, num_local * rank

    def __call__(self, x_MD: Tensor, counts_E: Tensor) -> Tensor:
        number_M = torch.arange(self.first, self.first + self.num_local).repeat_interleave(counts_E)
        return x_MD * (1 + number_M[:, None])


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_two_levels_bring_the_same_rows(seed: int, pool: Pool) -> None:
    for direct, two_level in pool.run(routed, 8, seed):
        assert torch.equal(direct, two_level)


def legs(mesh_config: MeshConfig) -> list[int]:
    """Ranks of each leg of a route."""
    mesh = Mesh(mesh_config)
    return [
        leg.ranks.size
        for leg in dispatch(mesh).exchange.route(torch.ones(8, dtype=torch.int64), 8 // mesh.ep.size).legs
    ]


def test_a_machine_collects_first(pool: Pool) -> None:
    assert pool.run(legs, 8, MeshConfig(dp=8, ep=8, ep_local=4)) == [[4, 2]] * 8
    assert pool.run(legs, 4, MeshConfig(dp=4, ep=4)) == [[4]] * 4


def order(mesh_config: MeshConfig) -> list[str]:
    """What begins and ends in a forward and a backward pass: collectives, and the computing of experts."""
    mesh, seen = Mesh(mesh_config), list[str]()

    class Experts(Scaled):
        def __call__(self, x_MD: Tensor, counts_E: Tensor) -> Tensor:
            return Computed.apply(super().__call__(x_MD, counts_E), seen)

    with flights(seen):
        y_PD, _ = dispatch(mesh)(
            torch.ones(8, 3, requires_grad=True), torch.arange(8)[:, None], None, Experts(4, mesh.rank)
        )
        y_PD.sum().backward()
    return seen


def test_experts_compute_while_rows_are_under_way(pool: Pool) -> None:
    """Forward and backward: whenever an expert computes, the other piece's rows are under way."""
    for seen in pool.run(order, 2, MeshConfig(dp=2, ep=2, ep_chunks=2)):
        assert beside(seen) == [1, 1, 1, 1], seen


@pytest.mark.parametrize(
    ("mesh", "said"),
    [
        ("ep=4,ep_local=3", "ep_local is 3, and ep x etp is 4: .* use 2, or leave it out"),
        ("ep=4,ep_local=4", "use 2, or leave it out"),
        ("ep=2,ep_local=2", "with 2 each; leave it out"),
        ("dp=2,ep_chunks=2", "ep_chunks is 2, and ep is 1: no rows travel; leave it out"),
        ("ep=2,ep_chunks=0", "ep_chunks"),
        ("ep=2,ep_chunks=1000000000", "there are at most 64; use fewer, such as 2"),
    ],
)
def test_ways_that_cannot_be(mesh: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        MeshConfig.parse(mesh)


@pytest.mark.parametrize(
    "mesh",
    [
        "ep=4,ep_local=2",
        "ep=2,ep_chunks=2",
        "fsdp=4,ep=2,etp=2,ep_local=2,ep_chunks=3",
        "tp=2,ep=4,ep_local=2,ep_chunks=2",
        "ep=4,ep_local=2,ep_chunks=2,pp=2,schedule=zbv",
    ],
)
def test_every_way_equals_one_process(mesh: str, pool: Pool) -> None:
    report = check.run(build(**HYBRID), MeshConfig.parse(mesh), None, pool, timeout=120)
    assert report.ok, report.wrong[:10]
