"""SIGTERM and SIGUSR1: ask a run to save and end. A signal only sets a flag; ranks decide together, once per step."""

import signal
import threading
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Stop:
    """A context manager that notes these signals instead of dying of them; a second one changes nothing.

    Enter it before anything slow (torch's import takes seconds). Outside the main thread, where Python handles no
    signals, and where it is not entered, it is a flag that others may set.
    """

    def __init__(self) -> None:
        self.requested = False
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
        self.requested = True
