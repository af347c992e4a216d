"""The pool: answers in order, failures named, deadlines kept, nothing left behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from parallel.testing import Pool, RankError


def add(x: int) -> tuple[int, int]:
    total = torch.tensor([x + dist.get_rank()])
    dist.all_reduce(total)
    return dist.get_rank(), int(total)


def fail_on_one() -> None:
    if dist.get_rank() == 1:
        raise ValueError("rank one is unwell")
    dist.barrier()


def stall() -> None:
    if dist.get_rank() == 0:
        time.sleep(60)


def process() -> int:
    return os.getpid()


def test_answers_come_back_in_order_and_workers_stay() -> None:
    with Pool(3) as pool:
        assert pool.run(add, 3, 10) == [(0, 33), (1, 33), (2, 33)]
        first = pool.run(process, 2)
        assert pool.run(add, 2, 1) == [(0, 3), (1, 3)]
        assert pool.run(process, 2) == first


def test_a_failure_is_named_and_the_pool_recovers() -> None:
    with Pool(2) as pool:
        with pytest.raises(RankError, match=r"(?s)rank 1 of 2:.*rank one is unwell") as error:
            pool.run(fail_on_one, 2)
        assert "Traceback" in str(error.value)
        assert pool.run(add, 2, 0) == [(0, 1), (1, 1)]


def test_a_stalled_rank_is_named_within_the_deadline() -> None:
    with Pool(2) as pool:
        started = time.monotonic()
        with pytest.raises(TimeoutError, match=r"ranks \[0\] of 2 did not answer within 3 s"):
            pool.run(stall, 2, timeout=3)
        assert time.monotonic() - started < 15


def test_ranks_do_not_keep_a_task_that_its_caller_gave_up() -> None:
    """As when a test's own time limit ends it."""

    def give_up(*_: object) -> None:
        raise KeyboardInterrupt

    with Pool(2) as pool:
        pool.run(add, 2, 1)
        before = signal.signal(signal.SIGALRM, give_up)
        signal.setitimer(signal.ITIMER_REAL, 0.5)
        try:
            with pytest.raises(KeyboardInterrupt):
                pool.run(stall, 2)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        assert pool.run(add, 2, 10, timeout=30) == [(0, 21), (1, 21)]


def test_workers_end_with_their_parent() -> None:
    """Even when it is killed while they work."""
    script = (
        "import os, signal\n"
        "from parallel.testing import Pool\n"
        "from tests.parallel.test_pool import process\n"
        "if __name__ == '__main__':\n"
        "    print(*Pool(2).run(process, 2), flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=60)
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) == 2
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline, "workers outlived their parent"
        time.sleep(0.2)


def test_two_pools_at_once() -> None:
    with Pool(2) as one, Pool(2) as two:
        assert one.run(add, 2, 0) == two.run(add, 2, 0)
