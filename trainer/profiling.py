"""The profiler's and the memory snapshot's switches: a few steps of a launch, written into the run's folder."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from models.limits import at_least
from parallel.mesh import Mesh

FOLDER = "profile"


@dataclasses.dataclass(frozen=True)
class ProfileConfig:
    """skip: steps of the launch before the first that is profiled (compiling and warming up). steps: how many are.

    memory: also record where GPU memory was allocated, for https://pytorch.org/memory_viz.
    """

    skip: int = 3
    steps: int = 2
    memory: bool = False

    def __post_init__(self) -> None:
        at_least(self, 1, "skip", "steps")
        if self.memory and not torch.cuda.is_available():
            raise ValueError("memory is true and this machine has no CUDA device to record; leave it out")


@contextlib.contextmanager
def profiled(config: ProfileConfig | None, folder: Path, mesh: Mesh) -> Iterator[Callable[[], None]]:
    """A function to be called after every step. Each rank writes `profile/rank-R.json`, for chrome://tracing or
    Perfetto."""
    if config is None:
        yield lambda: None
        return
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    out = folder / FOLDER
    out.mkdir(parents=True, exist_ok=True)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if mesh.device == "cuda" else [])]

    def write(found: profile) -> None:
        found.export_chrome_trace(str(out / f"rank-{rank}.json"))
        if config.memory:
            torch.cuda.memory._dump_snapshot(str(out / f"memory-rank-{rank}.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)

    if config.memory:
        torch.cuda.memory._record_memory_history()
    plan = schedule(wait=config.skip - 1, warmup=1, active=config.steps, repeat=1)
    with profile(activities=activities, schedule=plan, on_trace_ready=write) as running:
        yield running.step
