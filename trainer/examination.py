"""A model's answers to a synthetic task's held-out examples, on one process.

Shape suffixes: N examples, T tokens of an example, V vocabulary.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from configs.load import merge, override
from configs.structure import to_plain
from configs.validate import parse
from models.hf.folder import is_exported
from models.limits import at_least
from parallel.engine import Batch
from trainer.data.rows import on_device
from trainer.data.tasks.base import TaskConfig, TaskRows
from trainer.exported import Exported
from trainer.loaded import load_whole
from trainer.process import device_type
from trainer.progress import counting

Answer = Callable[[Batch], Tensor]

MICRO_BATCH = 64


@dataclasses.dataclass(frozen=True)
class Request:
    """What is asked for.

    model: folder of a run, a checkpoint or an export. task: its kind. settings: of the task, such as num_pairs=8;
    what is not given is the run's, where it learned this task. length: tokens of an example (default: as trained).
    limit: examples. micro_batch: examples at once. trust: run an export's code, whatever it is.
    """

    model: Path
    task: str
    settings: tuple[str, ...] = ()
    length: int | None = None
    limit: int | None = None
    micro_batch: int | None = None
    trust: bool = False

    def __post_init__(self) -> None:
        at_least(self, 1, "length", "limit", "micro_batch")

    def config(self, learned: TaskConfig | None) -> TaskConfig:
        """The task, of which the run's own settings are the defaults. Raises ConfigError for what it does not take."""
        data = to_plain(learned) if learned is not None and learned.kind == self.task else {"kind": self.task}
        for text in self.settings:
            data = merge(data, override(text, data))
        return parse(TaskConfig, data, "task")


@dataclasses.dataclass(frozen=True)
class Report:
    """figures: by name, each a mean over what it counts."""

    model: str
    task: dict[str, object]
    length: int
    examples: int
    figures: dict[str, float]

    def as_dict(self) -> dict[str, object]:
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        figures = ", ".join(f"{name} {value:.4f}" for name, value in self.figures.items())
        return (
            f"{self.model}: {figures}, over {self.examples:,} held-out examples of {self.task['kind']}, "
            f"{self.length} tokens each"
        )


def run(request: Request) -> Report:
    """Examine a model. Raises ValueError, one sentence, for what cannot be."""
    if is_exported(request.model):
        exported = Exported(request.model, request.trust)
        name, learned, length, seed, vocab_size = str(request.model), None, exported.max_length, 0, exported.vocab_size

        def answer(batch: Batch) -> Tensor:
            return exported.model(input_ids=batch.tokens, use_cache=False).logits
    else:
        config, lm, path = load_whole(request.model)
        name, learned, length, seed = str(path), config.data.task, config.data.sequence_length, config.run.seed
        vocab_size = config.model.vocab_size

        def answer(batch: Batch) -> Tensor:
            return lm(batch.tokens, documents_BT=batch.documents, positions_BT=batch.positions).logits

    length = request.length or length
    if length is None:
        raise ValueError(f"{name} does not say how long its sequences are; give --window, such as 64")
    task = request.config(learned)
    task.refuse(length, vocab_size, named="--window")
    rows = TaskRows(task, length, vocab_size, seed, held_out=True)
    count = min(len(rows), request.limit or len(rows))
    with counting(Console(stderr=True), "examining", count) as advance:
        figures = examine(answer, rows, count, request.micro_batch or MICRO_BATCH, advance)
    return Report(name, to_plain(task), length, count, figures)


@torch.no_grad()
def examine(
    answer: Answer, rows: TaskRows, count: int, micro_batch: int, advance: Callable[[int], object] = lambda _: None
) -> dict[str, float]:
    """Figures over the first `count` examples. answer: from a batch to logits [N, T, V]."""
    sums: dict[str, tuple[float, float]] = {}
    for start in range(0, count, micro_batch):
        indices = range(start, min(start + micro_batch, count))
        logits_NTV = answer(on_device(rows.rows(indices), device_type()))
        for logits_TV, index in zip(logits_NTV, indices, strict=True):
            for name, (value, number) in rows.task.measure(logits_TV, rows.example(index)).items():
                total, seen = sums.get(name, (0.0, 0.0))
                sums[name] = (total + value, seen + number)
        advance(len(indices))
    # Slices, whose names have a "/", behind what is true of all.
    order = sorted(sums, key=lambda name: ("/" in name, len(name), name))
    return {name: sums[name][0] / sums[name][1] for name in order if sums[name][1]}
