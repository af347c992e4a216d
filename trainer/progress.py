"""How much of long work is done, and when the rest will be: a bar on a terminal, a line at times in a log."""

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.filesize import decimal
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

SILENCE = 30.0  # seconds between two lines where there is no terminal


def say(console: Console, sentence: str) -> None:
    """Print a line as it is: brackets in paths and in others' messages are not markup."""
    console.print(sentence, markup=False, highlight=False, soft_wrap=True)


def counting(console: Console, what: str, total: int) -> contextlib.AbstractContextManager[Callable[[int], None]]:
    """Shows how many of `total` are done and the time that is left; what it gives is called with how many more are."""

    def line(done: int, seconds: float) -> str:
        return f"{done:,} of {total:,}"

    return advancing(console, what, total, (MofNCompleteColumn(),), line, transient=True)


def counting_bytes(console: Console, what: str, total: int) -> contextlib.AbstractContextManager[Callable[[int], None]]:
    """The same of bytes, with their speed."""

    def line(done: int, seconds: float) -> str:
        return f"{decimal(done)} of {decimal(total)}, {done / seconds / 1e6:.1f} MB/s"

    return advancing(console, what, total, (DownloadColumn(), TransferSpeedColumn()), line, transient=False)


@contextlib.contextmanager
def advancing(
    console: Console,
    what: str,
    total: int,
    columns: tuple[ProgressColumn, ...],
    line: Callable[[int, float], str],
    transient: bool,
) -> Iterator[Callable[[int], None]]:
    """columns: of the bar, for how much is done. line: the same in a log, of what is done and the seconds it took.
    transient: whether the bar goes when all is done."""
    if console.is_terminal:
        shown = (TextColumn("{task.description}", markup=False), BarColumn(), *columns, TimeRemainingColumn())
        with Progress(*shown, console=console, transient=transient) as bar:
            task = bar.add_task(what, total=total)
            yield lambda size: bar.advance(task, size)
        return
    began = said = time.monotonic()
    done = 0

    def advance(size: int) -> None:
        nonlocal done, said
        done += size
        now = time.monotonic()
        if now - said >= SILENCE and done:
            # A total in bytes may be an estimate, and less than there is.
            left = max(0, total - done) * (now - began) / done
            say(console, f"{what}: {line(done, now - began)}, {left:.0f} s left")
            said = now

    yield advance
