"""What this GPU makes of a 1.3B Llama and its variants: `python -m bench.gpu [--out FOLDER]`.

Step time, MFU and memory at a length of 4096 in bfloat16: transformers' Llama in a plain loop, eager and compiled, ours
likewise, and every variant, compiled, as a ratio to ours. Each runs in a process of its own; one that fails says why,
and the others go on. Writes results.json and a table.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
CONFIG = str(ROOT / "configs/bench/llama_1b3.yaml")
COMPILED = "train.compile=true"
# As many parameters in use as the dense FFN has: 2 of 8 experts of half its width.
EXPERTS = "num_experts: 8, hidden: 2816, top_k: 2"
DELTA = (
    "model.pattern=GGGA",
    "model.repeat=6",
    "model.layers.G={mixer: {kind: gated_deltanet, num_heads: 8, head_dim: 192, expand_v: 1.3333333333333333},"
    " ffn: {kind: swiglu, hidden: 5632}}",
)
MOE = "{kind: moe, num_experts: 8, hidden: 2816, router: {kind: mixtral, top_k: 2}}"
VARIANTS = {
    "plain": (),
    "GDN hybrid": DELTA,
    "MoE": (f"model.layers.A.ffn={MOE}",),
    "MoE++": ("model.layers.A.ffn={kind: moe_plus_plus, " + EXPERTS + "}",),
    "hyper n=4": ("model.residual={kind: hyper, streams: 4}",),
    "mHC": ("model.residual={kind: mhc, streams: 4}",),
    "MUDD": ("model.residual={kind: mudd}",),
    "reversible, all kept": ("model.residual={kind: reversible}",),
    "reversible": ("model.residual={kind: reversible}", "memory.kind=reversible"),
    "reversible, PaReprop": ("model.residual={kind: reversible}", "memory.kind=pareprop"),
}


@dataclasses.dataclass(frozen=True)
class Run:
    """found: what its last line of JSON says. why: it has none."""

    name: str
    found: dict[str, Any] | None = None
    why: str = ""


def measured(name: str, arguments: list[str], limit: float) -> Run:
    command = [sys.executable, "-m", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=limit)
    except subprocess.TimeoutExpired:
        return Run(name, why=f"took more than {limit:.0f} s")
    if done.returncode:
        return Run(name, why=(done.stderr.strip().splitlines() or ["no word"])[-1])
    return Run(name, json.loads(done.stdout.strip().splitlines()[-1]))


def runs(steps: int, limit: float) -> list[Run]:
    counted = ["--steps", str(steps)]
    made = []
    for how, flags in (("eager", []), ("compiled", ["--compile"])):
        peer = ["bench.peer_llama", "--shape", "1b3", "--device", "cuda", *flags, *counted]
        made.append((f"transformers, {how}", peer))
    ours = ["launch.cli", "bench", CONFIG, "--json", *counted]
    made.append(("plain, eager", ours))
    made += [(name, [*ours, COMPILED, *overrides]) for name, overrides in VARIANTS.items()]
    reference = "hyper n=4, plain torch"
    made.append((reference, [*ours, COMPILED, *VARIANTS["hyper n=4"], "kernels=reference"]))
    done = []
    for index, (name, arguments) in enumerate(made):
        print(f"{index + 1} of {len(made)}: {name}", file=sys.stderr, flush=True)
        done.append(measured(name, arguments, limit))
    return done


def table(done: list[Run]) -> Table:
    speed = {run.name: run.found["tokens_per_s"] for run in done if run.found}
    plain = speed.get("plain")
    rows = Table("model", "tokens/s", "step time to plain's", "MFU", "GiB", title="1.3B, length 4096, bfloat16")
    for run in done:
        if run.found is None:
            rows.add_row(run.name, run.why)
            continue
        ratio = f"{plain / run.found['tokens_per_s']:.2f}" if plain else ""
        mfu, memory = run.found.get("mfu"), run.found.get("memory_gib")
        figures = ("" if x is None else f"{x:.3g}" for x in (mfu, memory))
        rows.add_row(run.name, f"{run.found['tokens_per_s']:,.0f}", ratio, *figures)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--limit", type=float, default=150, help="seconds that one model may take")
    parser.add_argument("--out", type=Path, default=Path("runs/bench_gpu"))
    args = parser.parse_args()
    done = runs(args.steps, args.limit)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "results.json").write_text(json.dumps([dataclasses.asdict(run) for run in done], indent=1))
    Console(width=120).print(table(done))


if __name__ == "__main__":
    main()
