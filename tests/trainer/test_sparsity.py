"""2:4 sparse training: the masks, the rule written out, meshes, resuming, and what is refused."""

import dataclasses
import functools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from configs.validate import parse
from parallel import check
from parallel.engine import Engine
from parallel.mesh import Mesh, MeshConfig
from parallel.testing import Pool
from tests.contract.tiny import HYBRID, build
from tests.slow import in_turn
from tests.trainer import runs
from trainer.config import RunConfig
from trainer.optim.base import OptimConfig, two_steps
from trainer.preflight import refuse_optim
from trainer.sparsity.masks import patterns, transposable

MIB = 2**20


def optim(kind: str = "adamw", sparsity: dict[str, Any] | None = None, **fields: Any) -> OptimConfig:
    sparse = {"kind": "transposable", **(sparsity or {})}
    return parse(OptimConfig, {"kind": kind, "lr": 0.02, "sparsity": sparse, **fields})


def test_masks_are_the_best_of_all_that_are_2_of_4_both_ways() -> None:
    scores = torch.rand(8, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mask = transposable(scores)
    for row in range(0, 8, 4):
        for column in range(0, 12, 4):
            own, part = mask[row : row + 4, column : column + 4], scores[row : row + 4, column : column + 4]
            assert (own.sum(0) == 2).all() and (own.sum(1) == 2).all()
            assert (part * own).sum() == pytest.approx(float((part * patterns()).sum((1, 2)).max()), rel=1e-12)
    assert len(patterns()) == 90
    with pytest.raises(ValueError, match=r"a matrix of 6 x 8 has no 4 x 4 blocks"):
        transposable(scores[:6, :8])


def trained(
    config: OptimConfig, steps: int
) -> tuple[dict[str, list[Tensor]], list[dict[str, float]], list[dict[str, Tensor]], dict[str, float]]:
    """Parameters at first, before each gradient and at the end; reports; the gradients that were made up; weight
    decays."""
    engine = Engine(build(num_layers=2), Mesh.single(), seed=0, dtype=torch.float64)
    optimizer, generator = config.build(engine), torch.Generator().manual_seed(1)
    seen: dict[str, list[Tensor]] = {held.shard.name: [held.parameter.detach().clone()] for held in engine.held()}
    reports, used = [], []
    for _ in range(steps):
        optimizer.begin(config.lr)
        for held in engine.held():
            seen[held.shard.name].append(held.parameter.detach().clone())
            held.parameter.grad = torch.randn(held.parameter.shape, generator=generator, dtype=torch.float64)
        used.append({held.shard.name: held.gradient.clone() for held in engine.held()})
        optimizer.step(config.lr)
        reports.append(optimizer.report())
    for held in engine.held():
        seen[held.shard.name].append(held.parameter.detach().clone())
    decays = {held.shard.name: optimizer.setting(held).weight_decay for held in engine.held()}
    return seen, reports, used, decays


@pytest.mark.parametrize("until", [None, 3])
@pytest.mark.parametrize("offload", [None, 512 / MIB])
def test_the_rule_written_out(until: int | None, offload: float | None) -> None:
    """torch's AdamW on the dense weights; of FFNs the passes see those that the mask of two updates ago keeps."""
    steps, decay = 5, 0.3
    config = optim(sparsity={"refresh": 2, "decay": decay, "until": until}, offload=offload, weight_decay=0.1)
    seen, reports, used, decays = trained(config, steps)
    flips = torch.zeros(steps, 2)
    for name, values in seen.items():
        sparse = ".ffn." in name and name.endswith("weight") and "norm" not in name
        dense = torch.nn.Parameter(values[0].clone())
        mask = transposable(dense.detach().abs()).double() if sparse else torch.ones_like(dense)
        torch_adamw = torch.optim.AdamW([dense], lr=config.lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=decays[name])
        for step in range(steps):
            torch.testing.assert_close(values[step + 1], dense.detach() * mask, rtol=1e-12, atol=1e-14, msg=name)
            dense.grad = used[step][name] + decay * (dense.detach() * (1 - mask))
            torch_adamw.step()
            if sparse and until is not None and step + 1 >= until:
                mask = torch.ones_like(mask)
            elif sparse and (step + 1) % 2 == 0:
                new = transposable(dense.detach().abs()).double()
                flips[step] += torch.tensor([float((new != mask).sum()), mask.numel()])
                mask = new
        torch.testing.assert_close(values[-1], dense.detach() * mask, rtol=1e-12, atol=1e-14, msg=name)
    for report, (changed, count) in zip(reports, flips.tolist(), strict=True):
        assert report == ({"flip_rate": pytest.approx(changed / count)} if count else {})
    assert flips[1, 0] > 0


MESHES = ("tp=2", "ep=2,fsdp=4", "fsdp=2,tp=2,pp=2,schedule=zbv", "fsdp=2")


@pytest.mark.parametrize(("mesh", "kind"), in_turn(MESHES, ("adamw", "muon")))
def test_every_mesh_equals_one_process(mesh: str, kind: str, pool: Pool) -> None:
    """With matrices whose rows ranks share so that blocks lie on two of them, and stacks of experts."""
    config = optim(kind, {"match": "*", "refresh": 1, "decay": 0.1}, offload=4096 / MIB)
    settings = check.Settings(update=functools.partial(two_steps, config))
    report = check.run(build(**HYBRID, residual="hyper", tie_embeddings=True), MeshConfig.parse(mesh), settings, pool)
    assert report.ok, report.wrong[:10]


def sparse_run(config: RunConfig, **sparsity: Any) -> RunConfig:
    return dataclasses.replace(config, optim=optim(sparsity={"refresh": 2, **sparsity}))


@pytest.mark.parametrize("mesh", [MeshConfig(), MeshConfig(fsdp=2)], ids=str)
def test_a_run_that_stops_goes_on_bit_for_bit(tmp_path: Path, pool: Pool, mesh: MeshConfig) -> None:
    data = runs.prepare_data(tmp_path / "data")
    whole, parts = (
        sparse_run(runs.run_config(data, tmp_path / name, mesh, log_every=1), until=5) for name in ("whole", "parts")
    )
    records = pool.run(runs.run_through, mesh.world_size, whole)[0]
    assert pool.run(runs.run_interrupted, mesh.world_size, parts, 3)[0] == records
    flips = [record.get("update/flip_rate") for record in records if "train/loss" in record]
    assert [rate is not None for rate in flips] == [False, True, False, True, False, False]
    assert 0 < flips[1] < 1

    dense = dataclasses.replace(parts, optim=parse(OptimConfig, {"kind": "adamw", "lr": 0.02}))
    sentence = "optim.sparsity.kind is 'none', and 'transposable' in "
    with pytest.raises(ValueError, match=re.escape(sentence) + r".*use the old value, with optim.sparsity.until=6"):
        runs.run(dataclasses.replace(dense, mesh=MeshConfig()))


def test_refusals() -> None:
    def refused(model: Any, **sparsity: Any) -> str:
        with pytest.raises(ValueError) as caught:
            refuse_optim(model, optim(sparsity=sparsity))
        return str(caught.value)

    model = build(num_layers=1)
    assert refused(model, match="*.fnn.*").startswith("optim.sparsity.match is '*.fnn.*', which no parameter of the")
    assert refused(model, match="*norm*").startswith("optim.sparsity: match is '*norm*', and no matrix is called so")
    assert refused(build(num_layers=1, ffn={"kind": "swiglu", "hidden": 22})).startswith(
        "optim.sparsity: layers.0.ffn.branch.ffn.gate.weight is 22 x "
    )
    with pytest.raises(ValueError, match="refresh is 0; it must be at least 1"):
        optim(sparsity={"refresh": 0})
