"""A step leaves nothing behind: of a cycle through autograd's graph Python collects some later, and some never."""

import gc
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from configs.structure import instantiate, to_plain
from models.config import LMConfig
from models.memory.base import MemoryConfig
from parallel import check
from parallel.engine import Engine
from parallel.mesh import Mesh, MeshConfig
from parallel.testing import Pool
from tests.contract.tiny import HYBRID, build
from tests.slow import slow

MIXED = {**HYBRID, "residual": "reversible", "values": "resformer", "depth": "stochastic"}
LADDER = {"residual": "ladder", "ffn": "moe"}
EVERYDAY = [
    (MIXED, "fsdp=2", "none"),
    (LADDER, "tp=2,overlap=true", "none"),
    (MIXED, "cp=2,context=ring", "none"),
    (MIXED, "ep=4,ep_local=2,ep_chunks=2", "none"),
    (MIXED, "pp=2,schedule=zbv", "none"),
    (MIXED, "tp=2", "reversible"),
]
MORE = [
    *((MIXED, mesh, "none") for mesh in ("tp=2", "cp=2", "ep=2", "etp=2", "pp=2", "pp=2,schedule=interleaved")),
    *((MIXED, "tp=2", kind) for kind in MemoryConfig.kinds() if kind not in ("none", "reversible")),
]


def left(plain_config: dict[str, Any], mesh_config: MeshConfig, memory: MemoryConfig, steps: int) -> list[int]:
    """How many tensors and nodes of autograd's graph this rank has after each step."""
    config: LMConfig = instantiate(LMConfig, plain_config)
    mesh, settings = Mesh(mesh_config), check.Settings()
    engine = Engine(config, mesh, seed=0, dtype=settings.dtype, memory=memory)
    count = check.micro_batches(mesh_config, settings)
    batch = check.make_batch(config, mesh_config, settings)
    batch = check.share(batch, count, mesh.data_rank, mesh.data_size)
    kinds, counts = (Tensor, torch.autograd.Function, torch.autograd.graph.Node), []
    gc.collect()
    gc.disable()
    try:
        for _ in range(steps):
            engine.step_gradients(batch, count)
            counts.append(sum(isinstance(each, kinds) for each in gc.get_objects()))
    finally:
        gc.enable()
    return counts


@pytest.mark.parametrize(
    ("fields", "mesh", "memory"),
    [*EVERYDAY, *slow(MORE)],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_next_step_begins_with_no_more(fields: dict[str, Any], mesh: str, memory: str, pool: Pool) -> None:
    mesh_config = MeshConfig.parse(mesh)
    kept = instantiate(MemoryConfig, {"kind": memory, **MemoryConfig.of_kind(memory).example})
    arguments = (to_plain(build(**fields)), mesh_config, kept, 9)
    for counts in pool.run(left, mesh_config.world_size, *arguments, timeout=120):
        # Some is made once, some is freed a step later, and an earlier test's may go meanwhile.
        assert any(after <= before for before, after in itertools.pairwise(counts[2:])), counts
