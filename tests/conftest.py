"""One thread, and one pool of gloo processes, for the whole run."""

import os
import signal
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from parallel.testing import Pool

# Before anything imports Triton, as much of torch does: its own functions are interpreted, or not, from then on.
os.environ.setdefault("TRITON_INTERPRET", "1")
# Tests are small: threads that wait for one another on a busy machine made some of them 15 times as long.
torch.set_num_threads(1)
# A shell starts what it runs in the background with Ctrl-C ignored, and nohup with the loss of a terminal, which the
# runs that tests interrupt would inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session")
def pool() -> "Iterator[Pool]":
    from parallel.testing import Pool

    with Pool(8) as pool:
        yield pool
