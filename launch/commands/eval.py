"""`weft eval`: the loss of a run's newest checkpoint on held-out data.

Given a mesh of several ranks it starts the processes itself, as `weft train` does.
"""

import argparse
import json
import os

from launch.command import Command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="folder of a run or of a checkpoint, or a run's config")
    parser.add_argument("--data", metavar="PREFIX", help="of a .bin/.idx pair (default: the run's data.valid)")
    parser.add_argument("--mesh", help="such as dp=2 (default: one process; under torchrun the run's)")
    parser.add_argument("--json", action="store_true", help="one line of JSON")


def run(args: argparse.Namespace) -> int:
    from launch.runs import run_folder
    from parallel.mesh import MeshConfig
    from trainer.evaluate import describe, evaluate_run
    from trainer.preflight import refuse_evaluation

    folder = run_folder(args.run)
    if args.mesh is not None and "WORLD_SIZE" not in os.environ:
        mesh = MeshConfig.parse(args.mesh)
        if mesh.world_size > 1:
            from launch import agent
            from launch.group import Group

            # Here, since the processes would each report it.
            refuse_evaluation(folder, args.data, mesh)
            return agent.work(Group(nproc=mesh.world_size), ["-m", "launch.cli", "eval", args.run, *options(args)])
    result, path = evaluate_run(folder, args.data, args.mesh)
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(result.as_dict()) if args.json else describe(result, path))
    return 0


def options(args: argparse.Namespace) -> list[str]:
    data = [] if args.data is None else [f"--data={args.data}"]
    return [f"--mesh={args.mesh}", *data, *(["--json"] if args.json else [])]


COMMAND = Command("evaluate a run: loss, perplexity, bits per byte", add_arguments, run)
