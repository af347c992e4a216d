"""Scalars for TensorBoard.

torch's SummaryWriter writes from a thread of its own, which a full disk ends, and takes a second to import.
"""

import io
import itertools
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path

# Generated modules, whose names type checkers do not see.
from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]
from tensorboard.summary.writer.record_writer import RecordWriter

from trainer.appending import AppendingFile


class EventFile:
    """A new file of events in `folder`. purge_step: of earlier files, TensorBoard hides the steps from this one on."""

    def __init__(self, folder: Path, purge_step: int | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        stem = f"events.out.tfevents.{int(time.time()):010}.{socket.gethostname()}.{os.getpid()}"
        names = (folder / f"{stem}.{number}" for number in itertools.count())
        self._file = AppendingFile(next(name for name in names if not name.exists()))
        self._append(Event(file_version="brain.Event:2"))
        if purge_step is not None:
            self._append(Event(step=purge_step, session_log=SessionLog(status=SessionLog.START)))

    def scalars(self, step: int, values: Mapping[str, float]) -> OSError | None:
        """Record the values of a step, by name. Returns what prevents it, if anything does."""
        found = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        return self._append(Event(step=step, summary=Summary(value=found)))

    def _append(self, event: Event) -> OSError | None:
        event.wall_time = time.time()
        record = io.BytesIO()
        RecordWriter(record).write(event.SerializeToString())
        return self._file.append(record.getvalue())

    def close(self) -> None:
        self._file.close()
