"""The folder of a run: checkpoints/, metrics.jsonl, tensorboard/, and config.yaml as the last launch resolved it."""

import contextlib
from pathlib import Path

import yaml

from configs.structure import to_plain
from trainer.checkpoint import FOLDER
from trainer.config import RunConfig
from trainer.lock import sole_use
from trainer.metrics import EVENTS, METRICS

CONFIG = "config.yaml"


def claimed(folder: Path) -> contextlib.AbstractContextManager[None]:
    """The folder, made if need be, for one run alone as long as this lasts. Raises ValueError where another has it."""
    folder.mkdir(parents=True, exist_ok=True)
    return sole_use(folder, "stop that run first, or use another run.dir")


def refuse_lost(folder: Path) -> None:
    """Raise ValueError where a run has logs and no checkpoint: starting anew in silence would hide a loss."""
    log = folder / METRICS
    if log.is_file() and log.stat().st_size:
        raise ValueError(
            f"{folder} has the logs of a run and no checkpoint to resume from; restore one, use another run.dir, "
            "or start anew with --fresh"
        )


def retire(folder: Path) -> None:
    """Move what an earlier run left into old-1, old-2, ... inside the folder."""
    left = [folder / name for name in (FOLDER, METRICS, EVENTS, CONFIG) if (folder / name).exists()]
    if left:
        number = 1
        while (old := folder / f"old-{number}").exists():
            number += 1
        old.mkdir()
        for path in left:
            path.rename(old / path.name)


def write_config(folder: Path, config: RunConfig) -> None:
    """Write config.yaml, with every default spelled out."""
    folder.mkdir(parents=True, exist_ok=True)
    staging = folder / f"{CONFIG}.partial"
    try:
        staging.write_text(yaml.safe_dump(to_plain(config), sort_keys=False), encoding="utf-8")
        staging.replace(folder / CONFIG)
    except OSError as error:
        staging.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(folder / CONFIG)) from error
