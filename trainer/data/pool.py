"""Work in several processes, with progress."""

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

T = TypeVar("T")
SILENCE = 30.0  # seconds between two lines of progress where there is no terminal


def unordered(function: Callable[..., T], tasks: Iterable[tuple[Any, ...]], workers: int) -> Iterator[T]:
    """function(*task) of every task, as they are done; in this process if it is the only worker.

    Raises what a task raised, and ValueError when a worker was ended from outside.
    """
    if workers == 1:
        yield from (function(*task) for task in tasks)
        return
    waiting: set[Future[T]] = set()
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), prepare_worker)
    try:
        for task in tasks:
            waiting.add(pool.submit(function, *task))
            if len(waiting) > 2 * workers:
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        while waiting:
            done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in done)
    except BrokenProcessPool as error:
        raise ValueError(
            "a worker process was ended from outside, most often for want of memory; the same command with fewer "
            "--workers goes on where this one stopped"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def prepare_worker() -> None:
    """One thread for each worker, silence at Ctrl-C, and an end when the parent ends, in whatever way."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=follow_parent, daemon=True).start()


def follow_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


@contextlib.contextmanager
def progress(console: Console, what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Shows bytes done of `total`, speed and the time that is left; a terminal gets a bar, a log a line at times."""
    if console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        with Progress(*columns, TimeRemainingColumn(), console=console) as bar:
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
            said, speed = now, done / (now - began)
            left = max(0, total - done) / speed
            console.print(
                f"{what}: {decimal(done)} of {decimal(total)}, {speed / 1e6:.1f} MB/s, {left:.0f} s left",
                soft_wrap=True,
            )

    yield advance
