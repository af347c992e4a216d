"""What the processes of a run inherit on this machine."""

import os
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def environment(inherited: Mapping[str, str], processes: int = 1) -> dict[str, str]:
    """So that processes import this checkout, even in a folder that has a `models/` of its own, and share the cores."""
    path = [str(ROOT), *filter(None, [inherited.get("PYTHONPATH")])]
    own = {"PYTHONPATH": os.pathsep.join(dict.fromkeys(path)), "PYTHONSAFEPATH": "1"}
    threads = {"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // processes))} if processes > 1 else {}
    return {**threads, **inherited, **own}
