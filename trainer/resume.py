"""Taking up a run on all ranks: they look for the newest whole checkpoint together, and each reads what it holds."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar, cast

import torch.distributed as dist

from configs.structure import to_plain
from configs.validate import default_of, required
from parallel.engine import Engine
from parallel.pieces import Piece
from trainer import checkpoint
from trainer.checkpoint import FOLDER
from trainer.config import DataConfig, RunConfig
from trainer.shardfiles import ShardReader
from trainer.state import OptimizerState, RunState

T = TypeVar("T")
# What decides which samples a run sees: a resumed run that changes one of these does not see each once.
ORDER = ("data.train", "data.task", "data.sequence_length", "data.packing", "run.seed")


def everyone(action: Callable[[], T]) -> list[T]:
    """Run `action` on every rank; all return all results, or raise what the first to fail raised (a collective)."""
    answer: tuple[Any, Exception | None]
    try:
        answer = action(), None
    except (OSError, ValueError) as error:
        answer = None, error
    except Exception as error:
        # Others, such as safetensors' own, may not survive the journey; their text does.
        answer = None, RuntimeError(f"{type(error).__name__}: {error}")
    answers: list[Any] = [answer]
    if dist.is_initialized():
        answers *= dist.get_world_size()
        dist.all_gather_object(answers, answer)
    for _, failed in answers:
        if failed is not None:
            raise failed
    return [result for result, _ in answers]


def on_main(mesh_is_main: bool, action: Callable[[], T]) -> T:
    """Run `action` on rank 0 alone; every rank returns its result, or raises what it raised (a collective)."""
    return cast(T, everyone(lambda: action() if mesh_is_main else None)[0])


def saved(engine: Engine, optimizer: OptimizerState | None) -> Iterator[tuple[str, Piece, bool]]:
    """(name, piece, whether this rank saves it) of all that a checkpoint holds of this rank.

    A copy of a shared parameter goes by its owner's name, so that a name may come twice.
    """
    return engine.pieces(optimizer.state if optimizer else None)


def load(path: Path, engine: Engine, optimizer: OptimizerState | None = None) -> None:
    """Fill the weights, buffers and optimiser state that this rank holds from a checkpoint, whatever mesh wrote it.

    Raises ValueError on all ranks for what the checkpoint lacks (a collective).
    """
    reader = ShardReader(path)
    everyone(lambda: engine.take_up(reader.fill, optimizer.state if optimizer else None))


def resume(
    config: RunConfig, engine: Engine, optimizer: OptimizerState, warn: Callable[[str], None]
) -> RunState | None:
    """Take up the newest whole checkpoint of the run's folder, if any (a collective; all ranks must see the folder).

    Every rank verifies a share of the files. Raises ValueError if only damaged ones are left, or if the newest is of
    another model.
    """
    folder, mesh = Path(config.run.dir) / FOLDER, engine.mesh

    def judge(path: Path) -> str | None:
        share = (mesh.rank, mesh.config.world_size)
        return next(filter(None, everyone(lambda: checkpoint.damage(path, share=share))), None)

    found = on_main(mesh.is_main, lambda: checkpoint.steps(folder))
    path = checkpoint.newest_of(found, folder, warn if mesh.is_main else lambda _: None, judge)
    if path is None:
        return None
    content = checkpoint.read(path)
    for key, old, new in differences(with_defaults(content.config), to_plain(config)):
        if key.startswith("model."):
            raise ValueError(f"{key} is {new!r}, and {old!r} in {path}; use another run.dir, or the old value")
        if key == "optim.sparsity.kind":
            raise ValueError(
                f"{key} is {new!r}, and {old!r} in {path}, whose weights are seen in part; use the old value, with "
                f"optim.sparsity.until={content.state.step} for dense training from there on, or another run.dir"
            )
        if key.startswith(ORDER) and mesh.is_main:
            warn(
                f"{key} is {new!r}, and was {old!r} until step {content.state.step}; samples may repeat or be left out"
            )
    load(path, engine, optimizer)
    return content.state


def with_defaults(config: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's config; what decides on its samples and is younger than it was at its default."""
    defaults = {field.name: field for field in dataclasses.fields(DataConfig) if not required(field)}
    younger = {name: to_plain(default_of(field)) for name, field in defaults.items()}
    return {**config, "data": {**younger, **config["data"]}}


def differences(old: Any, new: Any, key: str = "") -> list[tuple[str, Any, Any]]:
    """(dotted key, old, new) of every leaf that differs; what only one side has is None on the other.

    Lists of one length are compared by element.
    """
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        old, new = dict(enumerate(old)), dict(enumerate(new))
    if not isinstance(old, dict) or not isinstance(new, dict):
        return [] if old == new else [(key, old, new)]
    found = []
    for name in dict.fromkeys([*old, *new]):
        found += differences(old.get(name), new.get(name), f"{key}.{name}" if key else name)
    return found
