"""`weft coord-check`: do activations and their changes keep their size in wider and deeper models of a config?

Of the config only `model` and `optim` count. Models are trained on one made-up batch at the full learning rate.
"""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING

from launch.command import Command, config_arguments

if TYPE_CHECKING:
    from trainer.coord_check import Point

ALONG = {"width": "d_model", "layers": "layers"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    config_arguments(parser, "YAML file of a run")
    parser.add_argument("--widths", type=numbers, default=[], help="of models to compare, such as 64,128,256")
    parser.add_argument("--depths", type=numbers, default=[], help="layers of models to compare, such as 2,4,8")
    parser.add_argument("--steps", type=int, default=4, help="updates (default: %(default)s)")
    parser.add_argument("--plot", type=Path, help="picture to draw, .png or .svg; needs matplotlib")
    parser.add_argument("--json", action="store_true", help="every point, as JSON")


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def run(args: argparse.Namespace) -> int:
    from rich.console import Console

    from launch.runs import load_run
    from trainer.coord_check import measure, sized
    from trainer.progress import counting

    config = load_run(args.config, args.overrides)
    refuse(args)
    models = {"width": [sized(config.model, width=width) for width in args.widths]}
    models["layers"] = [sized(config.model, layers=layers) for layers in args.depths]
    for model in (*models["width"], *models["layers"]):
        refuse_model(model)
    found: dict[str, list[Point]] = {along: [] for along in models}
    total = sum(map(len, models.values())) * (args.steps + 1)
    with counting(Console(stderr=True), "models trained", total) as advance:
        for along, some in models.items():
            for model in some:
                found[along] += measure(model, config.optim, args.steps, config.run.seed, lambda: advance(1))
    if args.plot is not None:
        draw(found, args.plot)
    if args.json:
        print(json.dumps({along: [dataclasses.asdict(point) for point in points] for along, points in found.items()}))
    else:
        print(*summary(found, args.steps), sep="\n")
    return 0


def refuse(args: argparse.Namespace) -> None:
    """Raise ValueError for what cannot be compared or drawn, before anything is trained."""
    if len(args.widths) < 2 and len(args.depths) < 2:
        raise ValueError("there is nothing to compare; give two sizes or more, such as --widths 64,128,256")
    for name in ("widths", "depths"):
        if sizes := getattr(args, name):
            if len(set(sizes)) < 2 or min(sizes) < 1:
                raise ValueError(f"--{name} is {','.join(map(str, sizes))}; give two different sizes or more")
    if args.steps < 1:
        raise ValueError(f"--steps is {args.steps}; it must be at least 1")
    if args.plot is None:
        return
    if args.plot.exists():
        raise ValueError(f"{args.plot} exists and is not overwritten; give another name, or remove it")
    if not args.plot.parent.is_dir():
        raise ValueError(f"{args.plot.parent} is no folder; make it first")
    try:
        import matplotlib as matplotlib
    except ImportError:
        raise ValueError("--plot needs matplotlib, which is not installed; install it, or leave --plot out") from None


def refuse_model(model: object) -> None:
    """Raise ValueError for a size that the model's plug-ins cannot have."""
    import torch

    from models.config import LMConfig
    from models.lm import LM

    assert isinstance(model, LMConfig)
    with torch.device("meta"):
        LM(model)


def summary(found: "dict[str, list[Point]]", steps: int) -> list[str]:
    """A table of slopes for each direction."""
    from trainer.coord_check import PARTS, slopes

    lines = [f"the power of the size that activations grow with, after {steps} updates (0: they keep their size)"]
    for along, points in found.items():
        if points:
            sizes = sorted({getattr(point, along) for point in points})
            lines.append(f"{ALONG[along]} {', '.join(map(str, sizes))}")
            size, change = (slopes(points, along, steps, what) for what in ("size", "change"))
            lines += [f"  {part:7} size {size[part]:+.2f}   change {change[part]:+.2f}" for part in PARTS]
    return lines


def draw(found: "dict[str, list[Point]]", file: Path) -> None:
    """A row for each direction, a column for each part, a line for each number of updates."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from trainer.coord_check import PARTS

    rows = [(along, points) for along, points in found.items() if points]
    figure, axes = pyplot.subplots(
        len(rows), len(PARTS), figsize=(12, 3 * len(rows)), layout="constrained", squeeze=False
    )
    for row, (along, points) in enumerate(rows):
        steps = sorted({point.step for point in points})
        sizes = sorted({getattr(point, along) for point in points})
        for column, part in enumerate(PARTS):
            panel = axes[row, column]
            for step in steps:
                own = [point for point in points if point.part == part and point.step == step]
                own.sort(key=lambda point: getattr(point, along))
                color = pyplot.get_cmap("viridis")(step / max(steps))
                panel.plot(sizes, [point.size for point in own], "o-", color=color, label=f"{step} updates")
            panel.set(xscale="log", yscale="log", xlabel=ALONG[along], title=part)
            panel.set_xticks(sizes, [str(size) for size in sizes], minor=False)
            panel.minorticks_off()
            panel.grid(alpha=0.3)
        axes[row, 0].set_ylabel("mean |x|")
    axes[0, -1].legend(fontsize="small")
    figure.savefig(file, dpi=100)
    pyplot.close(figure)


COMMAND = Command("compare activations of wider and deeper models of a config", add_arguments, run)
