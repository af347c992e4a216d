"""`weft train`: train, or resume, the run of a config.

Started alone with a mesh of several ranks, it becomes torchrun with as many processes on this machine; under torchrun
or a cluster's launcher it is one of them.
"""

import argparse
import os

from launch.command import Command, config_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    config_arguments(parser)
    parser.add_argument("--stop-after", metavar="STEP", type=int, help="save and end after this step")
    parser.add_argument("--fresh", action="store_true", help="move aside what the run's folder holds, and start anew")


def run(args: argparse.Namespace) -> int:
    from launch.local import torchrun
    from launch.runs import load_run
    from trainer.loop import Launch, train
    from trainer.preflight import refuse_data
    from trainer.process import joined

    config = load_run(args.config, args.overrides)
    # Before torchrun, which would answer with a report on every rank.
    refuse_data(config)
    launch = Launch(args.stop_after, args.fresh)
    if config.mesh.world_size > 1 and "WORLD_SIZE" not in os.environ:
        torchrun(config.mesh.world_size, ["train", args.config, *args.overrides, *options(args)])
    with joined(config.mesh) as mesh:
        train(config, mesh, launch)
    return 0


def options(args: argparse.Namespace) -> list[str]:
    stop = [] if args.stop_after is None else [f"--stop-after={args.stop_after}"]
    return [*stop, *(["--fresh"] if args.fresh else [])]


COMMAND = Command("train, or resume, a run", add_arguments, run)
