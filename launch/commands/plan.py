"""`weft plan`: what crosses the layers of a config's model, before anything is allocated.

Of a config that has a model alone, one sequence of one token is planned; otherwise a micro-batch of one data rank.
"""

import argparse
import json
from typing import TYPE_CHECKING, Any

from launch.command import Command, config_arguments

if TYPE_CHECKING:
    from models.plan import Life

SHOWN = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    config_arguments(parser, "YAML file of a run, or one with a model alone")
    parser.add_argument(
        "--state", action="store_true", help="the entries that cross the layers, and their bytes (the default)"
    )
    parser.add_argument("--json", action="store_true", help="as JSON")


def run(args: argparse.Namespace) -> int:
    plan = state_plan(args.config, args.overrides)
    if args.json:
        print(json.dumps(plan, indent=2))
    else:
        show(plan)
    return 0


def state_plan(file: str, overrides: list[str]) -> dict[str, Any]:
    """entries: each with its life. boundaries: what lies before each layer and after the last. stages: of a pipeline,
    what each has, is sent, and takes from an earlier stage of its rank."""
    import torch

    from configs.load import load
    from launch.runs import load_model, load_run
    from models.lm import LM
    from models.plan import boundary_bytes, lives
    from parallel.mesh import MeshConfig
    from parallel.stages import StagePlan, plan

    alone = not {"train", "data", "optim"} <= load(file, overrides).keys()
    shape, dtype, mesh = (1, 1), "float32", MeshConfig()
    if alone:
        config = load_model(file, overrides)
    else:
        whole = load_run(file, overrides)
        config, dtype, mesh = whole.model, whole.train.dtype, whole.mesh
        shape = (whole.train.micro_batch, whole.data.sequence_length)
    with torch.device("meta"):
        model = LM(config)
    stages: list[StagePlan] = plan(model, mesh, shape[1]) if mesh.pp > 1 else []
    stream = getattr(torch, dtype)
    tokens = shape[0] * shape[1]
    return {
        "sequences": shape[0],
        "tokens": shape[1],
        "entries": [described(life, stream) for life in lives(model)],
        "boundaries": [
            {
                "before": f"layers.{index}" if index < len(model.blocks) else "close",
                "entries": [entry.name for entry in boundary],
                "bytes": boundary_bytes(boundary, tokens, stream),
            }
            for index, boundary in enumerate(model.boundaries)
        ],
        "stages": [
            {
                "stage": stage.index,
                "rank": stage.rank,
                "layers": [stage.start, stage.stop],
                "parameters": stage.cost.parameters,
                "flops_per_token": stage.cost.flops_per_token,
                "received": [entry.name for entry in stage.received],
                "bytes": boundary_bytes(stage.received, tokens, stream),
                "taken": [entry.name for entry in stage.taken],
            }
            for stage in stages
        ],
    }


def described(life: "Life", stream: Any) -> dict[str, Any]:
    entry = life.entry
    return {
        "name": entry.name,
        "shape": list(entry.shape),
        "dtype": str(entry.dtype_in(stream)).removeprefix("torch."),
        "layout": entry.layout.value,
        "heads": entry.heads,
        "writers": list(life.writers),
        "readers": list(life.readers),
    }


def show(plan: dict[str, Any]) -> None:
    """Two tables, entries and boundaries, and with a pipeline a third."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    entries = Table("entry", "shape", "dtype", "layout", "writer", "last reader", box=box.SIMPLE_HEAD)
    for row in plan["entries"]:
        leading = [] if row["layout"] == "per_rank" else ["B", "T"]
        writers = row["writers"]
        first = ", ".join(writers) if len(writers) <= SHOWN else f"{writers[0]}, {writers[1]} ... {writers[-1]}"
        shape = " x ".join([*leading, *map(str, row["shape"])])
        last = row["readers"][-1] if row["readers"] else "-"
        entries.add_row(row["name"], shape, row["dtype"], row["layout"], first, last)
    micro_batch = f"{plan['sequences']} x {plan['tokens']} tokens"
    boundaries = Table("boundary", "entries", f"bytes for {micro_batch}", box=box.SIMPLE_HEAD)
    for row in plan["boundaries"]:
        boundaries.add_row(f"before {row['before']}", ", ".join(row["entries"]), f"{row['bytes']:,}")
    stages = Table(
        *("stage", "rank", "layers", "parameters", "FLOPs per token", "is sent", "bytes", "takes from its rank"),
        box=box.SIMPLE_HEAD,
    )
    for row in plan["stages"]:
        first, last = row["layers"][0], row["layers"][1] - 1
        stages.add_row(
            *(str(row["stage"]), str(row["rank"]), str(first) if first == last else f"{first} to {last}"),
            *(f"{row['parameters']:,}", f"{row['flops_per_token']:,.0f}"),
            *(", ".join(row["received"]), f"{row['bytes']:,}", ", ".join(row["taken"])),
        )
    console = Console()
    if not console.is_terminal:
        # A pipe has no width: rows must not be folded.
        console = Console(width=10_000)
    console.print(entries, boundaries, *([stages] if plan["stages"] else []))


COMMAND = Command("show what crosses the layers of a config's model", add_arguments, run)
