"""The processes of a run on one machine."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[1]


def torchrun(processes: int, arguments: Sequence[str]) -> NoReturn:
    """Become a torchrun whose processes are each `weft` with these arguments."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += ["-m", "launch.cli", *arguments]
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, command, environment(os.environ))


def environment(inherited: "os._Environ[str] | dict[str, str]") -> dict[str, str]:
    """So that the processes import this checkout, even in a folder that has a `models/` of its own."""
    path = [str(ROOT), *filter(None, [inherited.get("PYTHONPATH")])]
    return {**inherited, "PYTHONPATH": os.pathsep.join(path), "PYTHONSAFEPATH": "1"}
