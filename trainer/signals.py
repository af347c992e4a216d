"""SIGTERM and SIGUSR1: ask a run to save and end. A signal sets a flag, and ranks decide together, once per step."""

import contextlib
import os
import signal
import threading
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Stop:
    """A context manager that notes these signals instead of dying of them; a second one changes nothing.

    Enter it before anything slow (torch's import takes seconds). Outside the main thread, where Python handles no
    signals, and where it is not entered, it is a flag that others may set.

    answer: a line that the first signal is answered with at once, on standard error; none unless it is set.
    """

    def __init__(self) -> None:
        self.requested = False
        self.answer = b""
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Stop":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
            # A launcher may have started this process with them blocked; one that came too early has waited for this.
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        first, self.requested = not self.requested, True
        if first and self.answer:
            # One system call: print may be what was interrupted, and must not be entered twice.
            with contextlib.suppress(OSError):
                os.write(2, self.answer)
