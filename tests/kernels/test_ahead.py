"""The interpreter takes what no GPU's compiler would: so all kernels are compiled too, without one."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is an optional dependency (the extra `triton`)")

KERNEL = re.compile(r"^def (\w+_kernel)\(", re.MULTILINE)


@pytest.mark.timeout(600)
def test_every_kernel_compiles_for_a_gpu(tmp_path: str) -> None:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    del environment["TRITON_INTERPRET"]
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.ahead"], env=environment, capture_output=True, text=True, timeout=580
    )
    assert done.returncode == 0, done.stderr
    made = {line.partition(":")[0] for line in done.stdout.splitlines()}
    written = {name for path in Path("models/kernels").rglob("*.py") for name in KERNEL.findall(path.read_text())}
    assert made == written, "tests/kernels/ahead.py launches all kernels that there are"
