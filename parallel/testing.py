"""A pool of gloo processes, started once: spawning and importing torch for every test would cost seconds each.

A task is an importable function; it runs on the first `world` workers inside a process group made for it, and each
rank's return value comes back. A failure or a missed deadline ends the whole pool, which starts afresh on the next
task, so that no rank is ever left waiting. Workers end with their parent.
"""

import gc
import logging
import multiprocessing as mp
import os
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.tensor import debug

# Tasks. torch does not free all groups of a mesh of several dimensions, and their threads wake up a hundred times a
# second: after some hundred tasks they took more time than the tests.
RENEWED_AFTER = 25


class RankError(RuntimeError):
    """A task failed on one rank; the message is that rank's traceback."""


def end_with_parent(parent: int) -> None:
    """Exit once the parent is gone, even in the middle of a collective."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def work(connection: Connection) -> None:
    """The loop of one worker: receive a task, join its process group, run it, answer."""
    threading.Thread(target=end_with_parent, args=(os.getppid(),), daemon=True).start()
    torch.set_num_threads(1)
    # A failing schedule prints itself whole, once per rank; the traceback says enough.
    logging.getLogger("torch.distributed.pipelining").setLevel(logging.CRITICAL)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    gc.freeze()
    while True:
        try:
            task = connection.recv()
        except EOFError:
            os._exit(0)
        function, args, rank, world, port, name, environment = task
        os.environ.update(environment)
        try:
            store = PrefixStore(name, TCPStore("127.0.0.1", port, is_master=False))
            dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
            try:
                answer = (0.0, function(*args))
            except Exception:
                answer = (time.monotonic(), f"rank {rank} of {world}:\n{traceback.format_exc()}")
            finally:
                dist.destroy_process_group()
                # DTensor's cache would hand the next task meshes whose groups are gone. Older torch lacks the name.
                getattr(debug, "_clear_sharding_prop_cache", lambda: None)()
                # Models are cycles that hold groups, whose threads wake up a hundred times a second each.
                gc.collect()
        except Exception:
            answer = (time.monotonic(), f"rank {rank} of {world}:\n{traceback.format_exc()}")
        connection.send(answer)


class Pool:
    """Up to `size` gloo ranks. Use as a context manager, or call `close`."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._workers: list[tuple[Any, Connection]] = []
        self._store: TCPStore | None = None
        self._tasks = 0

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, function: Callable[..., Any], world: int, *args: Any, timeout: float = 120.0) -> list[Any]:
        """`function(*args)` on ranks 0..world-1; their return values in order.

        Raises RankError with the first failing rank's traceback, TimeoutError naming the ranks that did not answer.
        """
        if world > self.size:
            raise ValueError(f"the pool has {self.size} processes and the task wants {world}")
        if self._tasks % RENEWED_AFTER == 0:
            self.close()
        self._start(world)
        assert self._store is not None
        self._tasks += 1
        environment = {k: v for k, v in os.environ.items() if k.startswith("WEFT_")}
        try:
            for rank in range(world):
                task = (function, args, rank, world, self._store.port, f"task{self._tasks}", environment)
                self._workers[rank][1].send(task)
            return self._collect(world, timeout)
        except BaseException:
            # Whatever it was, such as a test's own time limit: ranks may still have the task, and must not get another.
            self.close()
            raise

    def _collect(self, world: int, timeout: float) -> list[Any]:
        deadline = time.monotonic() + timeout
        results: dict[int, Any] = {}
        failures: list[tuple[float, str]] = []
        waiting = {self._workers[rank][1]: rank for rank in range(world)}
        while waiting:
            ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready and failures:
                break
            if not ready:
                raise TimeoutError(f"ranks {sorted(waiting.values())} of {world} did not answer within {timeout:.0f} s")
            for connection in ready:
                assert isinstance(connection, Connection)
                rank = waiting.pop(connection)
                try:
                    failed, answer = connection.recv()
                except EOFError:
                    failed, answer = time.monotonic(), f"rank {rank} of {world} died without a word"
                results[rank] = answer
                if failed:
                    failures.append((failed, answer))
                    # The others fail next, because this one left: give them a moment, and report who was first.
                    deadline = min(deadline, time.monotonic() + 1.0)
        if failures:
            raise RankError(min(failures)[1])
        return [results[rank] for rank in range(world)]

    def _start(self, world: int) -> None:
        """Have at least `world` workers. They are forked from a server that has imported torch already."""
        if self._store is None:
            self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(["parallel.check"])
        while len(self._workers) < world:
            ours, theirs = context.Pipe()
            process = context.Process(target=work, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self._workers.append((process, ours))

    def close(self) -> None:
        """End all workers at once."""
        for process, connection in self._workers:
            connection.close()
            process.kill()
        for process, _ in self._workers:
            process.join()
        self._workers, self._store = [], None
