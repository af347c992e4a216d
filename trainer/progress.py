"""How much of a long piece of work is done, and when the rest will be."""

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

SILENCE = 30.0  # seconds between two lines where there is no terminal


@contextlib.contextmanager
def counting(console: Console, what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Shows how many of `total` are done and the time that is left; a terminal gets a bar, a log a line at times."""
    if console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task(what, total=total)
            yield lambda count: bar.advance(task, count)
        return
    began = said = time.monotonic()
    done = 0

    def advance(count: int) -> None:
        nonlocal done, said
        done += count
        now = time.monotonic()
        if now - said >= SILENCE and done < total:
            said, left = now, (now - began) * (total - done) / done
            console.print(f"{what}: {done:,} of {total:,}, {left:.0f} s left", soft_wrap=True)

    yield advance
