"""Files of work in progress: they have their name only once they are whole."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def read_json(file: Path) -> dict[str, Any] | None:
    """None for what is missing or damaged."""
    try:
        data = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return data if isinstance(data, dict) else None


def write_json(file: Path, data: Any) -> None:
    with publishing(file) as partial:
        partial.write_text(json.dumps(data), encoding="utf-8")


@contextlib.contextmanager
def publishing(file: Path) -> Iterator[Path]:
    """Another name to write to; at the end the file gets its own. Each process has a name of its own."""
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    yield partial
    partial.replace(file)
