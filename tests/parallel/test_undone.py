"""States computed back without a grid are other ones: by how much is measured, and choices are not made anew."""

import itertools
from collections import defaultdict
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from models.ffn.routing import RouterConfig
from models.layer import Layer
from models.lm import LM
from models.memory.by_letter import ByLetterConfig
from models.memory.pareprop import PaRepropConfig
from models.memory.reversible import ReversibleConfig
from models.memory.undone import DRIFT, Again, Call, Gradients
from models.mixers.lsh import LSH
from models.residual.fixed_point import GridConfig
from models.state import State
from parallel import check, collectives
from parallel.engine import Engine
from parallel.mesh import Mesh, MeshConfig, Ranks
from parallel.testing import Pool
from tests.contract.tiny import HYBRID, build, plain
from tests.slow import slow

EXPERTS = {
    **{kind: {"kind": "moe", "num_experts": 4, "hidden": 8, "router": {"kind": kind, **cls.example},
              **({} if cls.limits_itself else {"capacity_factor": 0.8})}
       for kind, cls in RouterConfig.kinds().items()},
    "moe_plus_plus": {"kind": "moe_plus_plus", "num_experts": 4, "hidden": 8, "capacity_factor": 0.8},
    "moe_plus_plus_released": {"kind": "moe_plus_plus_released", "num_experts": 4, "hidden": 8, "logits_std": 1.0},
}  # fmt: skip


def engine(dtype: torch.dtype = torch.float64, **model: Any) -> Engine:
    return Engine(build(**model), Mesh.single(), seed=0, dtype=dtype, memory=ReversibleConfig())


def step(built: Engine) -> check.Step:
    settings = check.Settings()
    return check.take_step(built, check.make_batch(built.config, MeshConfig(), settings), 2, None, settings)


@pytest.mark.parametrize("kind", EXPERTS)
def test_picks_are_those_of_the_forward_pass(kind: str) -> None:
    """Even where the rebuilt states have nothing to do with the ones that were there."""
    seen: dict[tuple[int, str], list[dict[str, Tensor]]] = defaultdict(list)
    run, undo = Layer.run_branch, Call.undo

    def recorded(self: Layer, role: str, *args: Any) -> Any:
        passed = run(self, role, *args)
        seen[self.index, role].append(dict(passed.result.stats))
        return passed

    def disturbed(self: Call, part: tuple[str, ...], after: State) -> Any:
        return undo(self, part, {name: torch.randn_like(x) for name, x in after.items()})

    with mock.patch.object(Layer, "run_branch", recorded), mock.patch.object(Call, "undo", disturbed):
        step(engine(residual="reversible", ffn=EXPERTS[kind]))
    count = 0
    for stats in seen.values():
        # Two micro-batches go forward and back in turn.
        for first, again in zip(stats[::2], stats[1::2], strict=True):
            assert all(torch.equal(value, again[name]) for name, value in first.items())
            count += len(first)
    assert count


def test_hashes_are_those_of_the_forward_pass() -> None:
    built = engine(residual="reversible", mixer="lsh")
    with mock.patch.object(LSH, "codes", autospec=True, side_effect=LSH.codes) as codes:
        step(built)
    assert codes.call_count == 2 * len(built.config.expanded)


def test_a_layer_runs_again_before_the_gradients_of_the_one_behind() -> None:
    events: list[str] = []
    undo, add = Call.undo, Gradients.add

    def undone(self: Call, part: tuple[str, ...], after: State) -> Any:
        events.append(f"again {self.layer.index}")
        return undo(self, part, after)

    def added(self: Gradients, again: Again) -> None:
        events.append(f"gradients {self.call.layer.index}")
        add(self, again)

    built = Engine(build(3, residual="midpoint"), Mesh.single(), seed=0, memory=PaRepropConfig())
    with mock.patch.object(Call, "undo", undone), mock.patch.object(Gradients, "add", added):
        built.step_gradients(check.make_batch(built.config, MeshConfig(), check.Settings()), 1)
    assert events == ["again 2", "again 1", "gradients 2", "again 0", "gradients 1", "gradients 0"]


def test_letters_of_one_memory_are_undone_together() -> None:
    """One chain, whose first layer alone measures."""
    layer = {"mixer": plain("mixer", "attention"), "ffn": plain("ffn", "swiglu")}
    config = build(2, pattern="AB", layers={"A": layer, "B": layer}, residual="reversible")
    memory = ByLetterConfig({"A": ReversibleConfig(), "B": ReversibleConfig()})
    found = step(Engine(config, Mesh.single(), seed=0, dtype=torch.float64, memory=memory)).statistics
    assert [name for name in found if name.endswith(DRIFT)] == [f"layers.0.{DRIFT}"]


def drift(built: Engine) -> float:
    return ReversibleConfig().report(step(built).statistics)["drift"]


@pytest.mark.parametrize("residual", ["reversible", "midpoint"])
def test_drift_is_the_error_of_the_last_state_rebuilt(residual: str) -> None:
    """About as much as measured with other models of 24 layers: 2e-15, 4e-7 and 1e-2."""
    expected = {torch.float64: (1e-17, 1e-14), torch.float32: (1e-8, 1e-5), torch.bfloat16: (1e-3, 1e-1)}
    for dtype, (least, most) in expected.items():
        found = drift(engine(dtype, pattern="A", repeat=24, residual=residual))
        assert least < found < most, dtype
        assert bool(ReversibleConfig().warning({"drift": found}, {}, exact=False)) == (dtype == torch.bfloat16)


def test_a_drift_that_grew_tenfold_is_told_again() -> None:
    kept = ReversibleConfig(alarm=1e-3)
    assert kept.warning({"drift": 9e-3}, {"drift": 1e-3}, exact=False) is None
    sentence = kept.warning({"drift": 1.1e-2}, {"drift": 1e-3}, exact=False)
    assert sentence is not None and "a relative error of 1.1e-02, above its alarm of 1.0e-03" in sentence
    assert kept.warning({"drift": 1e-2}, {}, exact=False) and not kept.warning({"drift": 0.0}, {}, exact=True)
    sentence = kept.warning({"drift": 1e-9}, {}, exact=True)
    assert sentence is not None and "look for a collective that does not repeat itself" in sentence


def test_drift_is_that_of_what_was_there() -> None:
    """A state that is rebuilt at nine tenths of its size is off by a tenth."""
    undo = Call.undo

    def shrunk(self: Call, part: tuple[str, ...], after: State) -> Any:
        again, before = undo(self, part, after)
        last = not self.keeper.index and "mixer" in part
        return again, {name: 0.9 * x if last else x for name, x in before.items()}

    with mock.patch.object(Call, "undo", shrunk):
        assert drift(engine(residual="reversible")) == pytest.approx(0.1, rel=1e-9)


def test_no_drift_on_a_grid() -> None:
    """It is not even measured."""
    found = step(engine(residual={"kind": "reversible", "grid_bits": 40}))
    assert ReversibleConfig().report(found.statistics) == {}


def drift_on(mesh: MeshConfig, residual: str, unsteady: bool) -> dict[str, float]:
    """Of a model on a grid. unsteady: no two sums over ranks come out alike."""
    config = build(**HYBRID, residual={"kind": residual, "grid_bits": 14})
    calls, plain_sum = itertools.count(), collectives.reduce_scatter

    def summed(x: Tensor, dim: int, ranks: Ranks) -> Tensor:
        return plain_sum(x, dim, ranks) + unsteady * 1e-3 * next(calls)

    with mock.patch.object(collectives, "reduce_scatter", summed):
        place = Mesh(mesh)
        built = Engine(config, place, seed=0, memory=ReversibleConfig())
        settings = check.Settings(dtype=torch.float32)
        count = check.micro_batches(mesh, settings)
        batch = check.share(check.make_batch(config, mesh, settings), count, place.data_rank, place.data_size)
        return ReversibleConfig().report(check.take_step(built, batch, count, None, settings).statistics)


@pytest.mark.parametrize("mesh", ["tp=2", "ep=2,fsdp=2", "cp=2", "cp=2,context=ring", "fsdp=2", "tp=2,pp=2"])
def test_sums_over_ranks_on_a_grid_come_out_twice_alike(mesh: str, pool: Pool) -> None:
    """Which is measured, where there are any."""
    parsed = MeshConfig.parse(mesh)
    for residual in ("reversible", "midpoint"):
        found = pool.run(drift_on, parsed.world_size, parsed, residual, False)
        assert all(report == ({} if mesh == "fsdp=2" else {"drift": 0.0}) for report in found)


def test_a_sum_over_ranks_that_does_not_repeat_itself_is_seen(pool: Pool) -> None:
    for report in pool.run(drift_on, 2, MeshConfig(tp=2), "reversible", True):
        assert ReversibleConfig().warning(report, {}, exact=True)


@pytest.mark.parametrize("residual", ["reversible", *slow(["midpoint", "multi_split"])])
def test_states_on_a_grid_come_back_bit_for_bit(residual: str) -> None:
    with mock.patch.object(GridConfig, "exact", False):
        assert drift(engine(torch.float32, repeat=96, residual={"kind": residual, "grid_bits": 14})) == 0


def test_a_pass_without_gradients_between_two_with() -> None:
    """Evaluation in between leaves what is rebuilt alone."""
    built = engine(residual="reversible")
    (model,) = built.models
    batch = check.make_batch(built.config, MeshConfig(), check.Settings())
    assert isinstance(model, LM)
    loss = model(batch.tokens, batch.targets, keys_B=batch.keys).loss
    with torch.no_grad():
        model(batch.tokens, batch.targets)
    assert loss is not None
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
