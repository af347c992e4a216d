"""bfloat16 computation over float32 masters: the same arithmetic on one process and on every mesh.

A gradient of a micro-batch is rounded to bfloat16 wherever it is computed, and gradients are added up in float32.
Meshes that split a batch into the same forward passes therefore agree to float32; those that split the products inside
(tensor, context, expert ranks) agree to bfloat16.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from configs.structure import instantiate, to_plain
from models.config import LMConfig
from parallel import check, pipeline
from parallel.engine import Batch, Engine
from parallel.mesh import Mesh, MeshConfig
from parallel.testing import Pool
from tests.contract.tiny import HYBRID, build, every_kind, of_kind
from tests.slow import slow
from trainer.optim.adamw import AdamWConfig

HYBRID_MODEL = build(**HYBRID, residual="hyper", depth="skip_middle")


def made(config: LMConfig, mesh: MeshConfig, count: int) -> Batch:
    """The step of a mesh: one sequence per forward pass, `count` passes per data rank."""
    return check.make_batch(config, mesh, check.Settings(micro_batches=count))


def gradients(
    plain: dict[str, Any], mesh_config: MeshConfig, batch: Batch, count: int, dtype: torch.dtype
) -> tuple[dict[str, Tensor], float]:
    """(whole gradients by name, loss) of a step on this mesh; `count` forward passes per data rank."""
    config, mesh = instantiate(LMConfig, plain), Mesh(mesh_config)
    engine = Engine(config, mesh, seed=0, dtype=dtype)
    engine.load_full_state(check.shaken(engine.full_state(), 0))
    own = check.share(batch, count, mesh.data_rank, mesh.data_size)
    engine.evaluate(own)  # whose copies must be gone when gradients are asked for
    loss = float(engine.step_gradients(own, count).loss)
    found = engine.gather(lambda held: held.parameter.grad)
    assert {g.dtype for g in found.values()} == {torch.promote_types(dtype, torch.float32)}
    assert all(held.parameter.dtype == torch.promote_types(dtype, torch.float32) for held in engine.held())
    assert not any(name in module.__dict__ for model in engine.models for module in model.modules()
                   for name, _ in module.named_parameters(recurse=False))  # fmt: skip
    return found, loss


def errors(found: dict[str, Tensor], reference: dict[str, Tensor]) -> dict[str, float]:
    assert found.keys() == reference.keys()
    floor = 1e-5 * max(float(g.abs().max()) for g in reference.values())
    return {name: check.error(found[name].double(), value.double(), floor) for name, value in reference.items()}


EVERYDAY = ("fsdp=2", "hsdp=2x2", "pp=2,schedule=zbv", "fsdp=2,pp=2,schedule=interleaved")
MORE = ("dp=2", "pp=2", "fsdp=2,pp=2,schedule=zbv", "dp=2,pp=2,schedule=zero_bubble")


@pytest.mark.parametrize("mesh", [*EVERYDAY, *slow(MORE)])
def test_the_same_passes_give_the_same_gradients(mesh: str, pool: Pool) -> None:
    """Up to the order of float32 additions: 2^-24 for each of the passes, of terms that may be a few times their sum.

    Sums in bfloat16, or float32 entries of the state that are cast on the way, would be 2^-9 off.
    """
    config = MeshConfig.parse(mesh)
    count = max(2, 2 * config.pp)
    batch = made(HYBRID_MODEL, config, count)
    passes = count * config.replicate * config.shard
    arguments = (to_plain(HYBRID_MODEL), batch)
    reference, loss = gradients(arguments[0], MeshConfig(), batch, passes, torch.bfloat16)
    for found, its_loss in pool.run(gradients, config.world_size, arguments[0], config, batch, count, torch.bfloat16):
        assert its_loss == pytest.approx(loss, rel=1e-6)
        worst = errors(found, reference)
        assert max(worst.values()) < passes * 2**-24 * 16, sorted(worst.items(), key=lambda item: -item[1])[:5]


@pytest.mark.parametrize("mesh", ["tp=2", "cp=2", "ep=2", "fsdp=2,tp=2,pp=2"])
def test_split_products_are_as_exact_as_whole_ones(mesh: str, pool: Pool) -> None:
    """Against float64, the mesh's gradients are no further off than twice what one process's are, all in all.

    Both round the same quantities, at other places of the same sums.
    """
    model, config = build(ffn="swiglu") if "ep" not in mesh else build(ffn="moe"), MeshConfig.parse(mesh)
    count = max(2, 2 * config.pp)
    batch, plain = made(model, config, count), to_plain(model)
    passes = count * config.replicate * config.shard
    exact, _ = gradients(plain, MeshConfig(), batch, passes, torch.float64)
    alone, _ = gradients(plain, MeshConfig(), batch, passes, torch.bfloat16)

    def distance(found: dict[str, Tensor]) -> float:
        return sum(float((found[name].double() - g).square().sum()) for name, g in exact.items()) ** 0.5

    assert distance(alone) > 1e-4 * sum(float(g.square().sum()) for g in exact.values()) ** 0.5, "not bfloat16 at all"
    for found, _ in pool.run(gradients, config.world_size, plain, config, batch, count, torch.bfloat16):
        assert distance(found) < 2 * distance(alone)


@pytest.mark.parametrize(("slot", "kind"), every_kind())
def test_every_kind_computes_in_bfloat16(slot: str, kind: str) -> None:
    """Losses beside the cross-entropy are float32, and all gradients are finite."""
    config = of_kind(slot, kind)
    engine = Engine(config, Mesh.single(), seed=0, dtype=torch.bfloat16)
    records: list[pipeline.Record] = []
    add = pipeline.Record.add
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline.Record, "add", lambda record, out: (records.append(record), add(record, out)))
        out = engine.step_gradients(made(config, MeshConfig(), 2), 2)
    assert out.loss.isfinite()
    for record in records:
        assert {loss.dtype for losses in record.losses for loss in losses.values()} <= {torch.float32}
        assert {loss.dtype for loss in record.token_loss} == {torch.float32}
    for held in engine.held():
        assert held.gradient.dtype == torch.float32 and held.gradient.isfinite().all(), held.shard.name


def test_the_wire_of_a_pipeline() -> None:
    """Streams travel in bfloat16, and entries that are declared float32 as that."""
    stage = Engine(HYBRID_MODEL, Mesh.single(), seed=0, dtype=torch.bfloat16).models[0]
    entries = {entry.name: entry for entry in stage.boundaries[2]}
    dtypes = {
        name: pipeline.example([entry], 1, 4, Mesh.single(), torch.bfloat16)[0].dtype for name, entry in entries.items()
    }
    assert dtypes["streams"] == torch.bfloat16 and dtypes["losses"] == torch.float32
    assert dtypes["router_logits"] == torch.float32
    assert set(dtypes.values()) == {torch.bfloat16, torch.float32}


def losses_of_small_steps(plain: dict[str, Any], mesh: MeshConfig, batch: Batch, steps: int) -> tuple[int, list[float]]:
    """(parameters that have not moved, losses) over steps that are each below the resolution of bfloat16."""
    engine = Engine(instantiate(LMConfig, plain), Mesh(mesh), seed=0, dtype=torch.bfloat16)
    optimizer = AdamWConfig(lr=2e-5, weight_decay=0.0).build(engine)
    own, losses = check.share(batch, 2, engine.mesh.data_rank, engine.mesh.data_size), []
    states = [engine.full_state()]
    for _ in range(steps):
        losses.append(float(engine.step_gradients(own, 2).loss))
        optimizer.step(2e-5)
        states.append(engine.full_state())
    before, after = states[:2]
    still = sum(torch.equal(after[name], value) for name, value in before.items())
    # The step is real, and no copy in bfloat16 of an element near 1 sees it.
    assert torch.equal(after["norm.weight"].bfloat16(), before["norm.weight"].bfloat16())
    return still, losses


@pytest.mark.parametrize("mesh", [MeshConfig(), MeshConfig(fsdp=2), *slow([MeshConfig(dp=2)])], ids=str)
def test_masters_take_up_steps_that_bfloat16_cannot_hold(mesh: MeshConfig, pool: Pool) -> None:
    """2e-5 is a thirtieth of bfloat16's step at 0.1, and a two-hundredth at 1: only masters can add such up."""
    config = build(num_layers=2)
    batch = made(config, mesh, 2)
    for still, losses in pool.run(losses_of_small_steps, mesh.world_size, to_plain(config), mesh, batch, 60):
        assert still == 0
        assert losses[-1] < losses[0] - 0.01
