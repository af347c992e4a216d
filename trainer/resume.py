"""Saving and taking up a run on all ranks: rank 0 writes and chooses, and every rank learns what came of it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from configs.structure import to_plain
from parallel.engine import Engine
from trainer import checkpoint
from trainer.checkpoint import Checkpoint
from trainer.config import RunConfig
from trainer.optim import AdamW
from trainer.state import RunState

T = TypeVar("T")
FOLDER = "checkpoints"
# What decides which samples a run sees: a resumed run that changes one of these does not see each once.
ORDER = ("data.train", "data.sequence_length", "run.seed")


def on_main(mesh_is_main: bool, action: Callable[[], T]) -> T:
    """Run `action` on rank 0 alone; every rank returns its result, or raises what it raised (a collective)."""
    answer: list[Any] = [None, None]
    if mesh_is_main:
        try:
            answer[0] = action()
        except (OSError, ValueError) as error:
            answer[1] = error
        except Exception as error:
            # Others, such as safetensors' own, may not survive the journey; their text does.
            answer[1] = RuntimeError(f"{type(error).__name__}: {error}")
    if dist.is_initialized():
        dist.broadcast_object_list(answer)
    if answer[1] is not None:
        raise answer[1]
    return answer[0]


def save(config: RunConfig, engine: Engine, optimizer: AdamW, state: RunState) -> Path:
    """Write a checkpoint to the run's folder (a collective)."""
    content = Checkpoint(state, to_plain(config), engine.full_state(), optimizer.full_state())
    folder = Path(config.run.dir) / FOLDER
    return on_main(engine.mesh.is_main, lambda: checkpoint.write(folder, content, config.train.keep_checkpoints))


def resume(config: RunConfig, engine: Engine, optimizer: AdamW, warn: Callable[[str], None]) -> RunState:
    """Take up the newest whole checkpoint of the run's folder, if any (a collective; all ranks must see the folder).

    Raises ValueError if only damaged ones are left, or if the newest is of another model.
    """
    folder = Path(config.run.dir) / FOLDER
    path = on_main(engine.mesh.is_main, lambda: checkpoint.newest(folder, warn))
    if path is None:
        return RunState()
    content = checkpoint.read(path)
    for key, old, new in differences(content.config, to_plain(config)):
        if key.startswith("model."):
            raise ValueError(f"{key} is {new!r}, and {old!r} in {path}; use another run.dir, or the old value")
        if key in ORDER and engine.mesh.is_main:
            warn(
                f"{key} is {new!r}, and was {old!r} until step {content.state.step}; samples may repeat or be left out"
            )
    engine.load_full_state(dict(content.model))
    optimizer.load_full_state(content.optimizer)
    return content.state


def differences(old: Any, new: Any, key: str = "") -> list[tuple[str, Any, Any]]:
    """(dotted key, old, new) of every leaf that differs; what only one side has is None on the other."""
    if not isinstance(old, dict) or not isinstance(new, dict):
        return [] if old == new else [(key, old, new)]
    found = []
    for name in dict.fromkeys([*old, *new]):
        found += differences(old.get(name), new.get(name), f"{key}.{name}" if key else name)
    return found
