"""A process of a run: joins the group that torchrun announces, builds the engine, and leaves the group at the end."""

import contextlib
import os
from collections.abc import Iterator

import torch
import torch.distributed as dist

from parallel.engine import Engine
from parallel.mesh import Mesh, MeshConfig
from trainer.config import RunConfig


@contextlib.contextmanager
def joined(config: MeshConfig) -> Iterator[Mesh]:
    """This process's place in the mesh. NCCL connects GPUs and gloo CPUs; a process started alone needs neither."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if "WORLD_SIZE" not in os.environ:
        yield Mesh(config, device)
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
    try:
        yield Mesh(config, device)
    finally:
        dist.destroy_process_group()


def build_engine(config: RunConfig, mesh: Mesh) -> Engine:
    """The run's model on the mesh, with its initial weights."""
    return Engine(config.model, mesh, seed=config.run.seed, dtype=getattr(torch, config.train.dtype))
