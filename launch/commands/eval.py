"""`weft eval`: the loss of a run's newest checkpoint on held-out data."""

import argparse
import json
import os

from launch.command import Command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="folder of a run, or its config")
    parser.add_argument("--data", metavar="PREFIX", help="of a .bin/.idx pair (default: the run's data.valid)")
    parser.add_argument("--mesh", help="such as dp=2 (default: one process; under torchrun the run's)")
    parser.add_argument("--json", action="store_true", help="one line of JSON")


def run(args: argparse.Namespace) -> int:
    from launch.runs import run_folder
    from trainer.evaluate import describe, evaluate_run

    result, path = evaluate_run(run_folder(args.run), args.data, args.mesh)
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(result.as_dict()) if args.json else describe(result, path))
    return 0


COMMAND = Command("evaluate a run: loss, perplexity, bits per byte", add_arguments, run)
