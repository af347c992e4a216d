"""What a run says of itself: metrics.jsonl, TensorBoard, and a progress line. Rank 0 writes; the others keep silent."""

import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from trainer.appending import AppendingFile
from trainer.progress import say

METRICS = "metrics.jsonl"
LOAD = ".ffn.expert_load"
DROPPED = ".ffn.expert_dropped"
STEPS = ".depth.steps"
EVENTS = "tensorboard"
# Seconds between lines where the output is not a terminal, whose progress line would fill a file.
QUIET = 15.0


@dataclasses.dataclass(frozen=True)
class StepMetrics:
    """One optimiser step.

    tokens: targets seen by the run so far. padding: share of the step's places without a target. mfu: model FLOPs per
    second over what the machine's matrix products reach. memory_gib: rank 0's peak, of its GPU or else of main memory.
    data_wait: share of the step's seconds until its batch was there. losses: those beside the cross-entropy. experts:
    by layer, the largest expert's load over the mean. dropped: by layer whose experts have limited room, the share of
    picks that found none. depth: "steps", how often a token runs the block of a model whose tokens stop by themselves.
    memory: what the kind of memory reports. update: what the optimiser reports.
    """

    step: int
    loss: float
    grad_norm: float
    lr: float
    tokens: int
    padding: float
    tokens_per_second: float
    mfu: float
    memory_gib: float
    data_wait: float
    losses: Mapping[str, float]
    experts: Mapping[str, float]
    dropped: Mapping[str, float]
    depth: Mapping[str, float]
    memory: Mapping[str, float]
    update: Mapping[str, float]

    @property
    def perplexity(self) -> float:
        return perplexity(self.loss)

    def flat(self) -> dict[str, float]:
        """Every value, by "group/name"."""
        grouped = ("step", "losses", "experts", "dropped", "depth", "memory", "update")
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in grouped}
        own = {"loss": own.pop("loss"), "perplexity": self.perplexity, **own, **self.losses}
        return {
            **{f"train/{name}": value for name, value in own.items()},
            **{f"experts/{layer}": value for layer, value in self.experts.items()},
            **{f"dropped/{layer}": value for layer, value in self.dropped.items()},
            **{f"depth/{name}": value for name, value in self.depth.items()},
            **{f"memory/{name}": value for name, value in self.memory.items()},
            **{f"update/{name}": value for name, value in self.update.items()},
        }

    def __str__(self) -> str:
        speed = f"{self.tokens_per_second:,.0f} tokens/s, MFU {self.mfu:.0%}"
        return f"loss {self.loss:.4f}, gradient {self.grad_norm:.2f}, lr {self.lr:.2e}, {speed}"


def perplexity(loss: float) -> float:
    """Of a loss in nats per token."""
    return math.exp(loss) if loss < 700 else math.inf


def expert_loads(stats: Mapping[str, Tensor]) -> dict[str, float]:
    """By layer: how many times the mean load the largest one is; 1 is even, and a layer without picks is left out."""
    # Loads are whole numbers, of which torch makes no mean.
    loads = {name.removesuffix(LOAD): load.double() for name, load in stats.items() if name.endswith(LOAD)}
    return {name: float(load.max() / load.mean()) for name, load in loads.items() if load.sum() > 0}


def dropped_picks(stats: Mapping[str, Tensor]) -> dict[str, float]:
    """By layer whose experts have limited room: the share of its picks that found none."""
    dropped = {name.removesuffix(DROPPED): float(x.sum()) for name, x in stats.items() if name.endswith(DROPPED)}
    return {layer: count / max(1.0, float(stats[layer + LOAD].sum())) for layer, count in dropped.items()}


def depth_used(stats: Mapping[str, Tensor]) -> dict[str, float]:
    """{"steps": mean over tokens}, where tokens stop by themselves. All of them run the first step."""
    runs = [float(value) for name, value in stats.items() if name.endswith(STEPS)]
    return {"steps": sum(runs) / max(runs)} if runs and max(runs) > 0 else {}


class Silent:
    """The interface, and what ranks other than 0 do."""

    def say(self, sentence: str) -> None:
        """Print a line above the progress line."""

    def step(self, metrics: StepMetrics, write: bool) -> None:
        """Move the progress line on; with `write`, record the step."""

    def record(self, step: int, values: Mapping[str, float]) -> None:
        """Record values of other kinds, such as of an evaluation, by "group/name"."""


class Log(Silent):
    """Records go to `folder`; see `opened`."""

    def __init__(self, folder: Path, start: int, steps: int, console: Console) -> None:
        # Imported here: the other ranks do without.
        from trainer.events import EventFile

        folder.mkdir(parents=True, exist_ok=True)
        drop_after(folder / METRICS, start)
        self._console, self._steps, self._said = console, steps, time.monotonic()
        self._began = (self._said, start)
        self._jsonl, self._failing = AppendingFile(folder / METRICS), False
        # The events of steps that a crashed run took after its last checkpoint are hidden.
        self._events = EventFile(folder / EVENTS, purge_step=start + 1 if start else None)
        columns = (
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.description}", markup=False),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self._progress = Progress(*columns, console=console, disable=not console.is_terminal)
        self._task = self._progress.add_task("", total=steps, completed=start)
        self._progress.start()

    def say(self, sentence: str) -> None:
        say(self._console, sentence)

    def step(self, metrics: StepMetrics, write: bool) -> None:
        self._progress.update(self._task, completed=metrics.step, description=str(metrics))
        now = time.monotonic()
        if not self._console.is_terminal and (now - self._said >= QUIET or metrics.step == self._steps):
            began, start = self._began
            left = (now - began) / (metrics.step - start) * (self._steps - metrics.step)
            self.say(f"step {metrics.step} of {self._steps}: {metrics}, {left:.0f} s left")
            self._said = now
        if write:
            self._write(metrics.step, metrics.flat())

    def record(self, step: int, values: Mapping[str, float]) -> None:
        self._write(step, values)

    def _write(self, step: int, values: Mapping[str, float]) -> None:
        line = json.dumps({"step": step, **values}) + "\n"
        failed = [self._jsonl.append(line.encode()), self._events.scalars(step, values)]
        error = next((error for error in failed if error is not None), None)
        if error is not None and not self._failing:
            self.say(
                f"warning: the metrics of step {step} could not be written ({error.strerror}); the run goes on, and "
                "writes them once it can"
            )
        self._failing = error is not None

    def close(self) -> None:
        self._progress.stop()
        self._jsonl.close()
        self._events.close()


@contextlib.contextmanager
def opened(folder: Path, start: int, steps: int, console: Console | None) -> Iterator[Silent]:
    """The log of a run that goes from step `start` to `steps`; without a console, a silent one."""
    if console is None:
        yield Silent()
        return
    log = Log(folder, start, steps, console)
    try:
        yield log
    finally:
        log.close()


def drop_after(file: Path, step: int) -> None:
    """Drop the records of later steps, which will be taken again, and a last line that was cut off."""
    if not file.is_file():
        return
    kept = []
    for line in file.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError):
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
    staging = file.with_name(file.name + ".partial")
    staging.write_text("".join(kept), encoding="utf-8")
    staging.replace(file)


def read(folder: Path) -> list[dict[str, float]]:
    """All records of a run, in order."""
    return [json.loads(line) for line in (folder / METRICS).read_text(encoding="utf-8").splitlines()]
