"""Triton's kernels on a GPU, where there is one: their numbers beside plain torch's, at the sizes of a 1.3B model."""

import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton", reason="Triton is an optional dependency (the extra `triton`)")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.timeout(600)
def test_every_kernel_equals_plain_torch() -> None:
    """In a process of its own, in which kernels are compiled and not interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "bench.kernels"], env=environment, capture_output=True, text=True, timeout=580
    )
    assert done.returncode == 0, done.stderr
