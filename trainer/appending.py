"""Records at the end of a file, each whole or not there at all, whatever happens to the disk."""

import contextlib
import errno
import os
from pathlib import Path
from typing import Self


class AppendingFile:
    """What cannot be written waits, and goes before the next record."""

    def __init__(self, file: Path) -> None:
        self._file = file.open("ab", buffering=0)
        self._waiting = b""

    def append(self, record: bytes) -> OSError | None:
        """Write all that waits, and this. Returns what prevents it, if anything does."""
        self._waiting += record
        end = os.fstat(self._file.fileno()).st_size
        try:
            if self._file.write(self._waiting) != len(self._waiting):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.truncate(end)
            return error
        self._waiting = b""
        return None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close it, after one more attempt at what waits."""
        self.append(b"")
        self._file.close()
