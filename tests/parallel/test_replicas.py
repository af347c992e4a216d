"""What ranks should hold alike: one changed bit on one rank is found and named, and nothing else is."""

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from configs.structure import instantiate, to_plain
from models.config import LMConfig
from parallel import replicas
from parallel.engine import Engine
from parallel.mesh import Mesh, MeshConfig
from parallel.replicas import differences, digest
from parallel.testing import Pool, RankError
from tests.contract.tiny import HYBRID, build, plain
from tests.trainer import runs
from trainer.config import RunConfig
from trainer.optim.adamw import AdamW
from trainer.optim.base import local

MODEL = build(**HYBRID, residual="hyper", tie_embeddings=True)
FEW_HEADS = build(mixer={**plain("mixer", "attention"), "num_heads": 8, "num_kv_heads": 2, "head_dim": 4})


def flip(x: Tensor) -> None:
    """The last bit of its last element."""
    bits = x.detach().flatten()[-1:].view(torch.int32)
    bits ^= 1
    x.detach().flatten()[-1:] = bits.view(x.dtype)


def found(mesh: MeshConfig, few: bool, name: str, rank: int) -> list[str]:
    """What is found once a bit of a parameter has been changed on one rank."""
    place = Mesh(mesh)
    engine = Engine(FEW_HEADS if few else MODEL, place, seed=0)
    if clean := differences(engine):
        return ["before", *map(str, clean)]
    for held in engine.held():
        if held.shard.name == name and place.rank == rank:
            flip(local(held.parameter))
    return [str(difference) for difference in differences(engine)]


EXPERTS, KEYS, NORM = "layers.0.ffn.branch.ffn.experts.up", "layers.0.mixer.branch.mixer.k.weight", "norm.weight"
CASES = [
    ("dp=2", False, KEYS, 1, f"{KEYS} differs between ranks 0 and 1"),
    ("dp=4", False, EXPERTS, 0, f"{EXPERTS} differs between ranks 0 and 1"),
    ("hsdp=2x2", False, KEYS, 3, f"{KEYS} differs between ranks 1 and 3"),
    ("fsdp=2", False, KEYS, 1, None),
    ("tp=2", False, NORM, 1, f"{NORM} differs between ranks 0 and 1"),
    ("tp=2", False, "embed.weight", 1, None),
    ("tp=4", True, KEYS, 3, f"{KEYS} differs between ranks 2 and 3"),
    ("ep=2", False, EXPERTS, 1, None),
    ("ep=2,dp=4", False, EXPERTS, 2, f"{EXPERTS} differs between ranks 0 and 2"),
    ("pp=2", False, "embed.weight", 1, "embed.weight differs between ranks 0 and 1"),
]


@pytest.mark.parametrize(("mesh", "few", "name", "rank", "sentence"), CASES)
def test_one_bit_is_found(mesh: str, few: bool, name: str, rank: int, sentence: str | None, pool: Pool) -> None:
    """Where others hold the same; what a rank alone holds is its own."""
    config = MeshConfig.parse(mesh)
    for answer in pool.run(found, config.world_size, config, few, name, rank):
        assert answer == ([] if sentence is None else [sentence])


def found_in_copies(mesh: MeshConfig, config: dict[str, Any], which: int, rank: int) -> list[str]:
    """What is found once a bit has changed of one of the copies that a rank has on its stages, the first or the second,
    of the first parameter that it has two of."""
    place = Mesh(mesh)
    engine = Engine(instantiate(LMConfig, config), place, seed=0)
    if place.rank == rank:
        copies = Counter(held.shard.name for held in engine.held())
        name = next(name for name, count in copies.items() if count == 2)
        flip(local([held.parameter for held in engine.held() if held.shard.name == name][which].data))
    return [str(difference) for difference in differences(engine)]


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize(
    ("mesh", "config", "rank"),
    [
        ("pp=2,schedule=interleaved", build(depth="universal"), 1),
        ("pp=2,schedule=zbv", build(tie_embeddings=True), 0),
        ("pp=2,schedule=zbv,fsdp=2", build(tie_embeddings=True), 1),
    ],
)
def test_copies_on_one_rank_are_compared(mesh: str, config: LMConfig, rank: int, which: int, pool: Pool) -> None:
    place = MeshConfig.parse(mesh)
    for answer in pool.run(found_in_copies, place.world_size, place, to_plain(config), which, rank):
        (sentence,) = answer
        assert re.search(rf" differs between (the stages of rank {rank}|ranks 0 and {rank})$", sentence), sentence


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.bool], ids=str)
def test_a_digest_sees_places_and_values(dtype: torch.dtype) -> None:
    x = torch.arange(70000).remainder(2).to(dtype)
    swapped = x.clone()
    swapped[0], swapped[1] = x[1], x[0]
    assert digest(x) == digest(x.clone())
    assert digest(x) != digest(swapped)
    assert digest(torch.zeros(0, dtype=dtype)) == 0


def test_a_digest_in_blocks_is_the_whole_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(3 * replicas.PRIME + 5)
    whole = digest(x)
    monkeypatch.setattr(replicas, "BLOCK", replicas.PRIME)
    assert digest(x) == whole


def drifting(config: RunConfig, step: int) -> None:
    """A run on one of whose ranks an update goes wrong by a bit."""
    mesh = Mesh(config.mesh)
    update: Callable[..., None] = AdamW.update
    calls = 0

    def wrong(self: AdamW, held: list, lr: float) -> None:
        nonlocal calls
        update(self, held, lr)
        calls += 1
        if calls == step and mesh.rank == 1:
            flip(local(held[0].parameter))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AdamW, "update", wrong)
        runs.run(config, None, mesh)


def test_a_run_ends_where_replicas_differ(tmp_path: Path, pool: Pool) -> None:
    config = runs.run_config(runs.prepare_data(tmp_path / "data"), tmp_path / "run", MeshConfig(dp=2), check_replicas=2)
    with pytest.raises(RankError, match=r"after step 4 embed\.weight differs between ranks 0 and 1") as error:
        pool.run(drifting, 2, config, 3)
    assert "find the step with train.check_replicas=1" in str(error.value)
