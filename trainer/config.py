"""The config of a run: the model's and the mesh's schemas, and the trainer's own."""

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Literal

from models.config import LMConfig, default
from models.limits import above_zero, at_least, check_size
from models.memory.base import MemoryConfig
from models.rules import reasons
from parallel.mesh import MeshConfig
from trainer.data.blend import shares
from trainer.data.packing.base import PackingConfig
from trainer.data.tasks.base import TaskConfig
from trainer.engines.base import EngineConfig
from trainer.faults import FaultsConfig
from trainer.optim.base import OptimConfig
from trainer.profiling import ProfileConfig
from trainer.schedule.base import ScheduleConfig, Span

TIMEOUT = 600.0


@dataclasses.dataclass(frozen=True)
class OutputConfig:
    """Where a run writes, and where its randomness starts.

    dir: the folder of its checkpoints, logs and resolved config. seed: of the weights and of the data's order.
    init_from: a run's folder, or one that weft import wrote, whose newest weights a new run starts from at step 0; the
    optimiser, the data and the mesh are the run's own.
    """

    dir: str
    seed: int = 0
    init_from: str | None = None

    def __post_init__(self) -> None:
        if not self.dir:
            raise ValueError("dir is empty; name a folder, such as runs/first")
        if self.init_from is not None and Path(self.init_from).absolute() == Path(self.dir).absolute():
            raise ValueError(f"init_from is {self.init_from}, which is dir too; give the new run a folder of its own")
        at_least(self, 0, "seed")


@dataclasses.dataclass(frozen=True)
class Source:
    """One dataset of a blend.

    path: what its .bin and .idx share. weight: its part of the samples, relative to the other sources' weights.
    """

    path: str
    weight: float

    def __post_init__(self) -> None:
        refuse_ending("path", self.path)
        above_zero(self, "weight", hint="; leave a source out that is not wanted")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What is learned from.

    train: an indexed dataset as the path that its .bin and .idx share, or a blend: a list of datasets, each with path
    and weight. task: a synthetic task instead, which brings its own held-out examples. valid: an indexed dataset.
    tokenizer: the folder or SentencePiece model that made them. sequence_length: tokens of a sequence. packing: how
    documents become sequences, of train and valid.
    """

    sequence_length: int
    train: str | tuple[Source, ...] | None = None
    task: TaskConfig | None = None
    valid: str | None = None
    tokenizer: str | None = None
    packing: PackingConfig = default(PackingConfig, "concatenate")

    def __post_init__(self) -> None:
        at_least(self, 1, "sequence_length")
        for name in ("train", "valid"):
            path = getattr(self, name)
            if isinstance(path, str):
                refuse_ending(name, path)
        if self.task is not None:
            for name in ("train", "valid", "tokenizer"):
                if getattr(self, name):
                    raise ValueError(f"both task and {name} are given; a task makes its own examples, leave {name} out")
            return
        if not self.sources:
            raise ValueError(
                "train is missing or an empty list; name a dataset, list path and weight of several, or give a task"
            )
        for path, times in Counter(source.path for source in self.sources).items():
            if times > 1:
                raise ValueError(f"train has {path} {times} times; list it once, with the sum of its weights")
        # Refuses what would leave a source without a sample.
        shares([source.weight for source in self.sources])

    @property
    def sources(self) -> tuple[Source, ...]:
        """What is trained on; a single dataset is a blend of one."""
        return (Source(self.train, 1.0),) if isinstance(self.train, str) else self.train or ()

    @property
    def weights(self) -> dict[str, float]:
        """Of the sources, by path."""
        return {source.path: source.weight for source in self.sources}


def refuse_ending(name: str, path: str) -> None:
    if path.endswith((".bin", ".idx")):
        raise ValueError(f"{name} is {path!r}; leave the ending out, {path[:-4]!r} names both files")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How long, how much at once, and how often to look.

    steps: optimiser steps. global_batch: sequences of a step. micro_batch: sequences of a data rank's forward pass.
    log_every, eval_every, save_every: in steps, 0 is never; a run also saves its last step. eval_batches: global
    batches of an evaluation. keep_checkpoints: how many of the newest stay. keep_every: those at multiples of so many
    steps stay too, 0 is none. dtype: of the computation; bfloat16 keeps the weights, the sums of gradients and the
    optimiser's state in float32. compile: the layers, with torch.compile; the first step then
    takes longer. faults: what happens at a loss that is not finite. profile: some steps, null for none. check_replicas:
    every so many steps ranks compare what they should hold alike, bit for bit, and a run ends where they do not; 0 is
    never. timeout: seconds that a process waits for the others, in whatever they do together, before the run ends.
    """

    steps: int
    global_batch: int
    micro_batch: int
    log_every: int = 1
    eval_every: int = 0
    eval_batches: int = 8
    save_every: int = 0
    keep_checkpoints: int = 2
    keep_every: int = 0
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    compile: bool = False
    faults: FaultsConfig = dataclasses.field(default_factory=FaultsConfig)
    profile: ProfileConfig | None = None
    check_replicas: int = 0
    timeout: float = TIMEOUT

    def __post_init__(self) -> None:
        at_least(self, 1, "steps", "global_batch", "micro_batch", "eval_batches", "keep_checkpoints", "timeout")
        at_least(self, 0, "log_every", "eval_every", "save_every", "keep_every", "check_replicas")


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Everything that a run depends on.

    kernels: which implementation of its operations the model calls, such as triton: one word for all of them, or one
    for each by name, and default for the others. auto is the fastest that the device has, reference plain torch.
    """

    model: LMConfig
    run: OutputConfig
    data: DataConfig
    train: TrainConfig
    optim: OptimConfig
    schedule: ScheduleConfig = default(ScheduleConfig, "cosine")
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    memory: MemoryConfig = default(MemoryConfig, "none")
    engine: EngineConfig = default(EngineConfig, "native")
    kernels: str | dict[str, str] = "auto"

    def __post_init__(self) -> None:
        train, length = self.train, self.data.sequence_length
        check_size(
            "train.micro_batch x data.sequence_length x model.vocab_size",
            *(train.micro_batch, length, self.model.vocab_size),
        )
        if train.steps * train.global_batch * length >= 2**63:
            raise ValueError(
                f"train.steps {train.steps} x train.global_batch {train.global_batch} x data.sequence_length {length} "
                "is 2**63 tokens or more, which cannot be counted; use smaller ones"
            )
        for reason in reasons(self.model):
            raise ValueError(f"model: {reason}")
        ranks = self.mesh.replicate * self.mesh.shard
        across = ranks * self.train.micro_batch
        if self.train.global_batch % across:
            near = max(across, self.train.global_batch // across * across)
            raise ValueError(
                f"train.global_batch is {self.train.global_batch}, not a multiple of {ranks} data ranks x micro_batch "
                f"{self.train.micro_batch} = {across}; use {near}, or another micro_batch"
            )
        if self.data.task is not None:
            self.data.task.refuse(length, self.model.vocab_size)
        self.schedule.refuse(self.span)

    @property
    def span(self) -> Span:
        """How long the run is, for its schedule."""
        return Span(self.train.steps, self.train.global_batch * self.data.sequence_length)

    @property
    def micro_batches(self) -> int:
        """How many forward passes of a data rank make a step."""
        return self.train.global_batch // (self.mesh.replicate * self.mesh.shard * self.train.micro_batch)
