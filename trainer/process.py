"""A process of a run: joins the group that torchrun announces, builds the engine, and leaves the group at the end."""

import contextlib
import ctypes
import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import Store, rendezvous  # pyright: ignore[reportPrivateImportUsage]

from configs.errors import sentence
from parallel.engine import Engine
from parallel.mesh import Mesh, MeshConfig
from trainer.allocator import keep_freed_memory
from trainer.config import TIMEOUT, RunConfig
from trainer.gathering import DIED, VERDICT, connect, of_attempt
from trainer.verdict import named
from trainer.watch import PEER_LOST, SaveLostError, Watch, lost_peer
from trainer.whereabouts import SAVING, TRAINING, Whereabouts

# The environment variable in which an agent leaves its process id.
AGENT = "WEFT_AGENT"
PR_SET_PDEATHSIG = 1
# Seconds in which all processes of a run must have started.
START = 300.0


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


@contextlib.contextmanager
def watched(where: Whereabouts, rank: int, world: int, timeout: float) -> Iterator[None]:
    """End where other processes of the run are gone, or keep this one waiting for too long, with one sentence of all.

    With WEFT_TRACEBACK=1 every process shows too where it lost them.
    """
    if os.environ.get("WEFT_TRACEBACK") != "1":
        # A stage that loses another would write the schedule of its whole step.
        logging.getLogger("torch.distributed.pipelining").setLevel(logging.CRITICAL)
    store = connect(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), timeout)
    with Watch(where, store, rank, world, timeout, os.environ.get("LOCAL_RANK", "0") == "0") as watch:
        try:
            yield
        except RuntimeError as error:
            if not lost_peer(error):
                raise
            if os.environ.get("WEFT_TRACEBACK") == "1":
                traceback.print_exc()
            watch.end(error, SAVING if isinstance(error, SaveLostError) else TRAINING)


def device_type() -> str:
    """What this machine computes on."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@contextlib.contextmanager
def joined(config: MeshConfig, timeout: float = TIMEOUT, where: Whereabouts | None = None) -> Iterator[Mesh]:
    """This process's place in the mesh. NCCL connects GPUs and gloo CPUs; a process started alone needs neither.

    timeout: seconds that a process waits for others. Raises ValueError for a number of processes that is not the
    mesh's, before they look for one another. Where they do not find one another, or lose one another later, it ends the
    process with PEER_LOST.
    """
    device = device_type()
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    else:
        keep_freed_memory()
    if "WORLD_SIZE" not in os.environ:
        yield Mesh(config, device)
        return
    config.refuse_world(int(os.environ["WORLD_SIZE"]))
    end_with_agent()
    rank, world = int(os.environ["RANK"]), config.world_size
    limit = timedelta(seconds=timeout)
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    store = None
    try:
        store = meet(rank, world, max(timeout, START))
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=limit)
    except RuntimeError as error:
        if os.environ.get("WEFT_TRACEBACK") == "1":
            traceback.print_exc()
        if store is None or not said(store):
            print(f"weft: rank {rank} ends: {sentence(error)}", file=sys.stderr)
        raise SystemExit(PEER_LOST) from error
    try:
        with watched(where or Whereabouts(), rank, world, timeout):
            yield Mesh(config, device, limit)
    finally:
        dist.destroy_process_group()


def meet(rank: int, world: int, seconds: float) -> Store:
    """The store of the run, once all its processes are there. They import and read the config at different speeds.

    Where they are not within `seconds`, raises RuntimeError on the first rank of those that are, and SystemExit on the
    others; SystemExit too where a launcher, which says so, has seen one die.
    """
    store, *_ = next(rendezvous("env://", rank, world, timeout=timedelta(seconds=seconds)))
    own = of_attempt(store)
    own.set(f"here/{rank}", "")
    own.add("here", 1)
    deadline = time.monotonic() + seconds
    while own.add("here", 0) < world:
        if own.check([DIED]):
            raise SystemExit(PEER_LOST)
        if time.monotonic() > deadline:
            missing = [other for other in range(world) if not own.check([f"here/{other}"])]
            if set(range(rank)) - set(missing):
                raise SystemExit(PEER_LOST)
            own.set(VERDICT, "")
            raise RuntimeError(
                f"{named(missing)} did not come within {seconds:g} s; start all {world} processes at the same time, on "
                "machines that reach one another"
            )
        time.sleep(0.1)
    return store


def said(store: Store) -> bool:
    """Whether another process has said why the run did not begin."""
    with contextlib.suppress(RuntimeError):
        return of_attempt(store).check([VERDICT])
    return False


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
