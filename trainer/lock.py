"""A folder that one process at a time writes to."""

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

LOCK = "lock"


@contextlib.contextmanager
def sole_use(folder: Path, way: str) -> Iterator[None]:
    """Keep an existing folder from others as long as this lasts, or this process lives.

    way: out, for a person. Raises ValueError where another process has it. Where files cannot be locked, nothing is
    kept from anyone.
    """
    with (folder / LOCK).open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            user = file.read().strip() or "another process"
            raise ValueError(f"{folder} is in use by {user}; {way}") from None
        except OSError:
            pass
        else:
            # For those that are refused, who can do without.
            with contextlib.suppress(OSError):
                os.truncate(file.fileno(), 0)
                os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        yield
