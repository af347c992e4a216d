"""A folder that is written whole: it gets its name when it is complete, and nothing that exists gives way to it."""

import contextlib
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from trainer.durable import sync_folder


def refuse_taken(out: Path, verb: str = "write") -> None:
    """Raise ValueError unless `out` can be made. verb: what is done to it."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"{out} exists and is not an empty folder; {verb} to a new one, or remove it")


@contextlib.contextmanager
def staged(out: Path) -> Iterator[Path]:
    """An empty folder beside `out`, which becomes `out` at the end; it is deleted where that is not reached."""
    parent = out.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    folder = parent / f".{out.absolute().name}.{uuid.uuid4().hex[:8]}"
    folder.mkdir()
    try:
        yield folder
        folder.rename(out)
        sync_folder(parent)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
