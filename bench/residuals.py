"""What residual topologies cost on this CPU: `python -m bench.residuals [--eager]`.

The 28M Llama of bench/llama_cpu.py trains with each, under torch.compile. Kinds take turns, each round in fresh
processes, so that a machine that slows down slows all; a ratio is that of the rounds' medians to the plain residual's.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from types import MappingProxyType

ROOT = Path(__file__).resolve().parents[1]
CONFIG = str(ROOT / "configs/bench/llama_cpu.yaml")
PLAIN = "plain"
KINDS = MappingProxyType({"hyper": ("model.residual.streams=4",), "mudd": ()})


def step_time(kind: str, overrides: tuple[str, ...], compiled: bool, steps: int) -> float:
    """Seconds."""
    own = [f"model.residual.kind={kind}", *overrides, f"train.compile={str(compiled).lower()}"]
    command = [sys.executable, "-m", "launch.cli", "bench", CONFIG, *own, "--json", "--steps", str(steps)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    return float(json.loads(done.stdout.strip().splitlines()[-1])["seconds_per_step"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--kinds", default=",".join(KINDS), help="of residuals, beside the plain one")
    args = parser.parse_args()
    kinds = [PLAIN, *args.kinds.split(",")]
    found: dict[str, list[float]] = {kind: [] for kind in kinds}
    for index in range(args.rounds):
        for kind, times in found.items():
            times.append(step_time(kind, KINDS.get(kind, ()), not args.eager, args.steps))
        print(
            f"round {index + 1}: {', '.join(f'{kind} {times[-1]:.3f} s' for kind, times in found.items())}", flush=True
        )
    plain = statistics.median(found.pop(PLAIN))
    for kind, times in found.items():
        print(f"{kind}: {statistics.median(times) / plain:.2f} times the plain residual's step")


if __name__ == "__main__":
    main()
