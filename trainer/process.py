"""A process of a run: joins the group that torchrun announces, builds the engine, and leaves the group at the end."""

import contextlib
import ctypes
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Iterator

import torch
import torch.distributed as dist

from parallel.engine import Engine
from parallel.mesh import Mesh, MeshConfig
from trainer.allocator import keep_freed_memory
from trainer.config import RunConfig

# The environment variable in which an agent leaves its process id.
AGENT = "WEFT_AGENT"
PR_SET_PDEATHSIG = 1
# The exit code of a process that could not go on because another one of the run was gone.
PEER_LOST = 4
# What gloo and NCCL say then.
GONE = re.compile("Connection reset by peer|Connection closed by peer|Broken pipe|remote process exited")
# Seconds before such a process ends, in which the one that is the cause says why, and ends first.
GRACE = 2


def end_with_agent() -> None:
    """Have Linux send SIGTERM once the agent that started this process dies, so that it ends instead of going on alone.

    Raises RuntimeError if that is already so.
    """
    agent = os.environ.get(AGENT)
    if agent is None or sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(agent):
        raise RuntimeError(f"the agent {agent} that started this process is gone")


def lost_peer(error: BaseException | None) -> bool:
    """Whether torch raised this, or what led to it, because another process was gone."""
    while error is not None:
        if isinstance(error, RuntimeError) and GONE.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextlib.contextmanager
def told_apart() -> Iterator[None]:
    """End with one line and PEER_LOST where only a peer is gone, so that what is shown in full is the cause.

    With WEFT_TRACEBACK=1 the traceback is shown too.
    """
    try:
        yield
    except RuntimeError as error:
        if not lost_peer(error):
            raise
        if os.environ.get("WEFT_TRACEBACK") == "1":
            traceback.print_exc()
        print(f"weft: rank {dist.get_rank()} ends, because another process of the run is gone", file=sys.stderr)
        time.sleep(GRACE)
        raise SystemExit(PEER_LOST) from error


def device_type() -> str:
    """What this machine computes on."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@contextlib.contextmanager
def joined(config: MeshConfig) -> Iterator[Mesh]:
    """This process's place in the mesh. NCCL connects GPUs and gloo CPUs; a process started alone needs neither."""
    device = device_type()
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    else:
        keep_freed_memory()
    if "WORLD_SIZE" not in os.environ:
        yield Mesh(config, device)
        return
    end_with_agent()
    dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
    try:
        with told_apart():
            yield Mesh(config, device)
    finally:
        dist.destroy_process_group()


def build_engine(config: RunConfig, mesh: Mesh, compile: bool = False) -> Engine:
    """The run's model on the mesh, with its initial weights. compile: worth it for many steps, so for training alone.

    Raises ValueError for a mesh that cannot hold the model.
    """
    return Engine(
        config.model,
        mesh,
        seed=config.run.seed,
        dtype=getattr(torch, config.train.dtype),
        compile=compile,
        memory=config.memory,
        sequence=config.data.sequence_length,
    )
