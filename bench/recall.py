"""Which mixers solve which sizes of multi-query associative recall (arXiv 2312.04927, figure 2 in small).

    python -m bench.recall                                  # everything, into docs/recall.json and docs/recall.svg
    python -m bench.recall --mixers attention,gla --pairs 4 --steps 200 --out /tmp/recall

Two layers without an FFN, width 64, as configs/task_mqar.yaml has them; a sequence is 8 tokens per pair. What is in the
JSON file already is not trained again, and a mixer that got less than half of a size right is left out of larger ones.
"""

import argparse
import io
import json
import math
import tempfile
from pathlib import Path
from types import MappingProxyType
from typing import Any

from rich.console import Console

from configs.load import load
from configs.validate import parse
from parallel.mesh import Mesh
from trainer import examination
from trainer.config import RunConfig
from trainer.loop import train
from trainer.progress import counting

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "task_mqar.yaml"
SOLVED = 0.5
HEADS: dict[str, Any] = {"num_heads": 2}
MIXERS = MappingProxyType(
    {
        "attention": HEADS,
        "window_attention": {**HEADS, "kind": "attention", "window": 8},
        "lsh": {**HEADS, "buckets": 8, "window": 8},
        "linear_attention": HEADS,
        "based": HEADS,
        "retention": HEADS,
        "gla": HEADS,
        "gsa": HEADS,
        "delta_net": HEADS,
        "gated_deltanet": {**HEADS, "head_dim": 32},
        "kda": {**HEADS, "head_dim": 32},
        "hgrn2": HEADS,
        "hgrn": HEADS,
        "rg_lru": HEADS,
        "lru": HEADS,
    }
)


def accuracy(mixer: dict[str, Any], pairs: int, steps: int, lr: float) -> float:
    """On held-out examples, after training on new ones."""
    with tempfile.TemporaryDirectory() as folder:
        overrides = [
            f"run.dir={folder}/run",
            f"model.layers.A.mixer={json.dumps(mixer)}",
            f"model.vocab_size={max(128, 16 * pairs)}",
            f"data.task.num_pairs={pairs}",
            f"data.sequence_length={8 * pairs}",
            f"train.steps={steps}",
            "train.eval_every=0",
            f"optim.lr={lr}",
        ]
        config: RunConfig = parse(RunConfig, load(CONFIG, overrides))
        train(config, Mesh.single(), console=Console(file=io.StringIO()))
        report = examination.run(examination.Request(Path(config.run.dir), "mqar"))
    return report.figures["accuracy"]


def plot(results: dict[str, dict[str, float]], file: Path) -> None:
    """Rows are mixers, columns are sizes, and the colour is the accuracy."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    sizes = sorted({size for row in results.values() for size in row}, key=int)
    values = [[row.get(size, float("nan")) for size in sizes] for row in results.values()]
    figure, axes = pyplot.subplots(figsize=(2.5 + 0.9 * len(sizes), 1 + 0.32 * len(results)), layout="constrained")
    axes.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    axes.set_xticks(range(len(sizes)), [f"{size} pairs\n{8 * int(size)} tokens" for size in sizes])
    axes.set_yticks(range(len(results)), list(results))
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            if not math.isnan(value):
                axes.text(x, y, f"{value:.2f}", ha="center", va="center", color="black" if value > 0.6 else "white")
    axes.set_title("Accuracy of recall, two layers of width 64", fontsize=10)
    figure.savefig(file)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mixers", default=",".join(name for name in MIXERS), help="by name (default: all)")
    parser.add_argument("--pairs", default="4,8,16", help="ascending (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=1000, help="of 128 new examples (default: %(default)s)")
    parser.add_argument("--lr", default="1e-3", help="a list of which the best counts (default: %(default)s)")
    parser.add_argument("--out", default="docs/recall", help="without ending (default: %(default)s)")
    args = parser.parse_args()
    out = Path(args.out)
    file = out.with_suffix(".json")
    results: dict[str, dict[str, float]] = json.loads(file.read_text()) if file.is_file() else {}
    asked = [(name, size) for size in args.pairs.split(",") for name in MIXERS if name in args.mixers.split(",")]
    todo = [(name, size) for name, size in asked if size not in results.get(name, {})]
    with counting(Console(stderr=True), "trainings", len(todo)) as advance:
        for name, size in todo:
            if any(value < SOLVED for known, value in results.get(name, {}).items() if int(known) < int(size)):
                advance(1)
                continue
            mixer = {"kind": name, **MIXERS[name]}
            found = [accuracy(mixer, int(size), args.steps, float(lr)) for lr in args.lr.split(",")]
            results.setdefault(name, {})[size] = max(found)
            file.write_text(json.dumps(results, indent=1) + "\n")
            plot({name: results[name] for name in MIXERS if name in results}, out.with_suffix(".svg"))
            advance(1)
    for name, row in results.items():
        print(f"{name:24}", *(f"{size} pairs {value:.3f}" for size, value in row.items()), sep="  ")


if __name__ == "__main__":
    main()
