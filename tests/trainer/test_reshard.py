"""A checkpoint holds whole tensors whatever mesh wrote it, and every mesh takes its own pieces out of it."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from configs.load import load
from configs.validate import parse
from parallel.engine import Engine
from parallel.gradients import Held
from parallel.mesh import Mesh, MeshConfig
from parallel.testing import Pool
from trainer import checkpoint
from trainer.checkpoint import Checkpoint
from trainer.config import RunConfig
from trainer.optim.base import local
from trainer.resume import load as load_checkpoint
from trainer.resume import saved
from trainer.state import RunState

# Fused projections, experts, fewer K/V heads than ranks, buffers, several streams.
CONFIG = "configs/debug_hybrid_hyper_moe_plus_plus.yaml"
MESHES = [
    "dp=2",
    "fsdp=2",
    "tp=4",
    "cp=2,fsdp=2",
    "hsdp=2x2",
    "ep=2,fsdp=2,tp=2",
    "pp=2,fsdp=2",
    "pp=2,tp=2,schedule=zbv",
    "ep=6,ep_local=3",
    "ep=2,etp=2,fsdp=4,reshard=false",
    "pp=2,stages=3+1",
    "cp=2,ep=2,context=ring",
]


class Moments:
    """An optimiser's state: one tensor like the parameter, and a count."""

    def __init__(self) -> None:
        self._of: dict[Tensor, dict[str, Tensor]] = {}

    def state(self, held: Held) -> Mapping[str, Tensor]:
        fresh = {"exp_avg": torch.zeros_like(local(held.parameter)), "step": torch.zeros(())}
        return self._of.setdefault(held.parameter, fresh)


def engine_of(mesh: MeshConfig, tied: bool) -> Engine:
    config = parse(RunConfig, load(CONFIG, [f"model.tie_embeddings={'true' if tied else 'false'}"]))
    return Engine(config.model, Mesh(mesh), seed=1)


def value_of(name: str, shape: torch.Size) -> Tensor:
    """A whole tensor that depends on its name alone."""
    seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=7).digest(), "big")
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def save(folder: Path, mesh: MeshConfig, tied: bool) -> None:
    engine, optimizer = engine_of(mesh, tied), Moments()
    for name, piece, _ in saved(engine, optimizer):
        whole = value_of(name, piece.shape)
        for box, view in piece.boxes():
            view.copy_(whole[tuple(slice(at, at + size) for at, size in zip(box.offsets, box.sizes, strict=True))])
    group = dist.new_group(backend="gloo") if dist.is_initialized() else None
    assert group is None or isinstance(group, dist.ProcessGroup)
    pieces = {name: piece for name, piece, owner in saved(engine, optimizer) if owner}
    checkpoint.save(folder, Checkpoint(RunState(1), {}, {}, {}, str(mesh)), pieces, group)


def wrong_after_load(path: Path, mesh: MeshConfig, tied: bool) -> list[str]:
    """The names whose local values are not what they must be."""
    engine, optimizer = engine_of(mesh, tied), Moments()
    load_checkpoint(path, engine, optimizer)
    wrong = []
    for name, piece, _ in saved(engine, optimizer):
        whole = value_of(name, piece.shape)
        filled = 0
        for box, view in piece.boxes():
            filled += view.numel()
            here = tuple(slice(at, at + size) for at, size in zip(box.offsets, box.sizes, strict=True))
            if not torch.equal(view, whole[here]):
                wrong.append(name)
        if filled != piece.local.numel():
            wrong.append(name)
    # Held once more, by the code that initialises: it must be the same elements.
    for held in engine.held():
        local = held.parameter.to_local() if isinstance(held.parameter, DTensor) else held.parameter
        mine = held.shard.cut(value_of(f"model/{held.shard.name}", torch.Size(held.shard.spec.shape)))
        if isinstance(held.parameter, DTensor):
            data = held.parameter.device_mesh
            chunks = mine.chunk(data.size(-1))
            index = data.get_local_rank(data.ndim - 1)
            mine = chunks[index] if index < len(chunks) else mine[:0]
        if not torch.equal(local, mine):
            wrong.append(f"held {held.shard.name}")
    return wrong


@pytest.mark.parametrize(
    ("text", "tied"),
    [
        # An embedding that is tied is one parameter of two stages.
        pytest.param(mesh, tied, marks=[pytest.mark.slow] if tied and "pp=" not in mesh else [])
        for mesh in MESHES
        for tied in (False, True)
    ],
)
def test_any_mesh_to_any_mesh(tmp_path: Path, pool: Pool, text: str, tied: bool) -> None:
    """Through one process, and directly to the next mesh of the list."""
    mesh = MeshConfig.parse(text)
    following = MeshConfig.parse(MESHES[(MESHES.index(text) + 1) % len(MESHES)])
    pool.run(save, mesh.world_size, tmp_path / "mesh", mesh, tied)
    (path,) = checkpoint.steps(tmp_path / "mesh").values()
    assert checkpoint.damage(path) is None
    content = checkpoint.read(path)
    alone = engine_of(MeshConfig(), tied)
    assert content.model.keys() == alone.full_state().keys()
    assert set(content.optimizer) == {
        f"{held.shard.name}/{key}" for held in alone.held() for key in ("exp_avg", "step")
    }
    for part, tensors in (("model", content.model), ("optimizer", content.optimizer)):
        for name in tensors:
            value = tensors[name]
            assert torch.equal(value, value_of(f"{part}/{name}", value.shape)), name
    assert pool.run(wrong_after_load, following.world_size, path, following, tied) == [[]] * following.world_size
    save(tmp_path / "one", MeshConfig(), tied)
    (one,) = checkpoint.steps(tmp_path / "one").values()
    assert pool.run(wrong_after_load, mesh.world_size, one, mesh, tied) == [[]] * mesh.world_size


def test_what_a_checkpoint_lacks_is_named(tmp_path: Path) -> None:
    tensors = {"norm.weight": torch.ones(3)}
    path = checkpoint.write(tmp_path, Checkpoint(RunState(1), {}, tensors, {}), keep=1)
    with pytest.raises(ValueError, match=r"has no model/embed\.weight"):
        load_checkpoint(path, engine_of(MeshConfig(), False))
    wide = {"embed.weight": torch.ones(3, 2)}
    path = checkpoint.write(tmp_path, Checkpoint(RunState(2), {}, wide, {}), keep=1)
    with pytest.raises(ValueError, match=r"model/embed\.weight is \[3, 2\] in .*, and \[512, 64\] here"):
        load_checkpoint(path, engine_of(MeshConfig(), False))
