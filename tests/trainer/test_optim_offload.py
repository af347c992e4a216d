"""An optimiser whose state waits in host memory takes the same steps, with little of it on the device."""

import dataclasses
import functools
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from models.memory.host import Host
from parallel import check
from parallel.engine import Engine
from parallel.mesh import Mesh, MeshConfig
from parallel.testing import Pool
from tests.contract.tiny import HYBRID, build
from tests.slow import in_turn
from tests.trainer import runs
from tests.trainer.test_optim import GROUPS, optim, stepped
from trainer.config import RunConfig
from trainer.optim.base import OptimConfig, one_step
from trainer.optim.states import HostStates, share

MIB = 2**20


@pytest.mark.parametrize("kind", sorted(OptimConfig.kinds()))
def test_steps_are_those_of_state_on_the_device(kind: str) -> None:
    """Bit for bit, in rounds of one parameter, of several and of all."""
    plain, _ = stepped(optim(kind=kind), **HYBRID)
    for mib in (1e-9, 8192 / MIB, 100):
        after, _ = stepped(optim(kind=kind, offload=mib), **HYBRID)
        assert all(torch.equal(value, plain[name]) for name, value in after.items()), mib


class Counting(Host):
    """Knows what came back to the device and is still there, and the most there was."""

    def __init__(self) -> None:
        self.now = self.most = 0

    def back(self, waiting: Tensor) -> Tensor:
        x = super().back(waiting)
        self.now += x.nbytes
        self.most = max(self.most, self.now)
        weakref.finalize(x, self.leave, x.nbytes)
        return x

    def leave(self, size: int) -> None:
        self.now -= size


def test_two_rounds_are_on_the_device_at_most() -> None:
    engine = Engine(build(num_layers=4), Mesh.single(), seed=0, dtype=torch.float64)
    optimizer = optim(kind="adamw").build(engine)
    sizes = [held.parameter.nbytes for held in engine.held()]
    host, largest = Counting(), max(sizes)
    optimizer.states = HostStates(host, largest / MIB)
    for held in engine.held():
        held.parameter.grad = torch.ones_like(held.parameter)
    optimizer.step(0.01)
    assert host.now == 0
    assert 2 * largest < host.most <= 2 * 2 * largest < 2 * sum(sizes), "two averages per parameter"


class Queue(Host):
    """The copies in their order, and for each round how many of them its update waits for."""

    def __init__(self) -> None:
        self.copies, self.waited = list[str](), list[int]()

    def back(self, waiting: Tensor) -> Tensor:
        self.copies.append("comes")
        return super().back(waiting)

    def refill(self, waiting: Tensor, x: Tensor) -> None:
        self.copies.append("goes")
        super().refill(waiting, x)

    def mark(self) -> int:
        return len(self.copies)

    def arrive(self, mark: object) -> None:
        assert isinstance(mark, int)
        self.waited.append(mark)


def test_an_update_does_not_wait_until_the_round_before_has_left() -> None:
    """Rounds of one parameter with two averages each: the next one comes before the update, and goes behind it."""
    engine = Engine(build(num_layers=2), Mesh.single(), seed=0)
    optimizer, host = optim(kind="adamw").build(engine), Queue()
    optimizer.states = HostStates(host, 1e-9)
    rounds = len(list(engine.held()))
    for held in engine.held():
        held.parameter.grad = torch.ones_like(held.parameter)
    optimizer.step(0.01)
    assert host.copies == 2 * ["comes"] + (rounds - 1) * (2 * ["comes"] + 2 * ["goes"]) + 2 * ["goes"]
    # Round i has come behind i rounds that came and i - 2 that went: that of i - 1 goes behind it.
    assert host.waited == [2, *(4 * index for index in range(1, rounds))]


def test_what_is_read_between_steps_is_the_host_s_copy() -> None:
    engine = Engine(build(num_layers=2), Mesh.single(), seed=0)
    optimizer = optim(kind="adamw", offload=1e-9).build(engine)
    before = {held.shard.name: optimizer.state(held) for held in engine.held()}
    for held in engine.held():
        held.parameter.grad = torch.ones_like(held.parameter)
    optimizer.step(0.01)
    for held in engine.held():
        state = optimizer.state(held)
        assert all(state[key] is value for key, value in before[held.shard.name].items())
        assert float(state["step"]) == 1 and bool((state["exp_avg"] != 0).all())


MESHES = ("fsdp=2", "ep=2,fsdp=4", "fsdp=2,tp=2,pp=2,schedule=zbv")


@pytest.mark.parametrize(("kind", "mesh"), in_turn(sorted(OptimConfig.kinds()), MESHES))
def test_a_step_on_every_mesh_equals_one_process(kind: str, mesh: str, pool: Pool) -> None:
    """Rounds must be cut alike by ranks that hold more and less of a parameter: Muon's gather in each of them."""
    model = build(**HYBRID, residual="hyper", tie_embeddings=True)
    settings = check.Settings(update=functools.partial(one_step, optim(kind=kind, groups=GROUPS, offload=4096 / MIB)))
    report = check.run(model, MeshConfig.parse(mesh), settings, pool)
    assert report.ok, report.wrong[:10]


def run_with(config: RunConfig, other: RunConfig) -> list[dict[str, float]]:
    """Four steps of one config, and the rest of the other."""
    runs.run_to(config, 4)
    return runs.run_through(other)


def test_a_checkpoint_does_not_tell_where_the_state_was(tmp_path: Path, pool: Pool) -> None:
    data = runs.prepare_data(tmp_path / "data")

    def config(name: str, **changes: Any) -> RunConfig:
        plain = runs.run_config(data, tmp_path / name, MeshConfig(fsdp=2))
        return dataclasses.replace(plain, optim=optim(kind="muon", **changes))

    whole = pool.run(runs.run_through, 2, config("whole"))[0]
    for name, first, then in (("there", None, 0.001), ("back", 0.001, None)):
        parts = pool.run(run_with, 2, config(name, offload=first), config(name, offload=then))[0]
        assert parts == whole, name


def test_shares_are_equal_on_ranks_that_hold_unequal_pieces(pool: Pool) -> None:
    shares = pool.run(shares_of, 3)
    assert shares[0] == shares[1] == shares[2]


def shares_of() -> list[float]:
    """Of a model whose widths three ranks cannot share alike."""
    engine = Engine(build(num_layers=1), Mesh(MeshConfig(fsdp=3)), seed=0)
    assert any(held.parameter.shape[0] % 3 for held in engine.held())
    return [share(held) for held in engine.held()]


def test_no_room_is_refused() -> None:
    with pytest.raises(ValueError, match=r"offload is 0\.0; it must be above 0, such as 256, or null to keep"):
        optim(kind="adamw", offload=0)
