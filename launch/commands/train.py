"""`weft train`: train, or resume, the run of a config.

Started alone with a mesh of several ranks, it starts as many processes on this machine; under torchrun or a cluster's
launcher it is one of them.
"""

import argparse
import os
from typing import TYPE_CHECKING

from launch.command import Command, config_arguments
from trainer.signals import Stop

if TYPE_CHECKING:
    from launch.group import Group
    from trainer.config import RunConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    config_arguments(parser)
    run_arguments(parser)


def run_arguments(parser: argparse.ArgumentParser) -> None:
    """What one launch of a run is told, beside the run's config."""
    parser.add_argument("--stop-after", metavar="STEP", type=int, help="save and end after this step")
    parser.add_argument("--fresh", action="store_true", help="move aside what the run's folder holds, and start anew")


def run(args: argparse.Namespace) -> int:
    # Before the imports, which take seconds in which a signal must not be missed.
    with Stop() as stop:
        from launch.group import Group

        config = checked(args)
        return start(args, config, Group(nproc=config.mesh.world_size), stop)


def checked(args: argparse.Namespace) -> "RunConfig":
    """The config, refused here where it can be: processes would each report it."""
    from launch.runs import load_run
    from trainer.preflight import refuse_data, refuse_machine

    config = load_run(args.config, args.overrides)
    refuse_machine(config)
    refuse_data(config)
    return config


def start(args: argparse.Namespace, config: "RunConfig", group: "Group", stop: Stop) -> int:
    """Train in this process, where it is one of the run's or the only one, otherwise in the processes of `group`."""
    from trainer.loop import Launch, train
    from trainer.process import joined
    from trainer.whereabouts import Whereabouts

    launch = Launch(args.stop_after, args.fresh)
    if "WORLD_SIZE" not in os.environ and not group.alone:
        from launch import agent

        return agent.train(group, ["-m", "launch.cli", "train", args.config, *args.overrides, *options(args)], stop)
    where = Whereabouts()
    with joined(config.mesh, config.train.timeout, where) as mesh:
        train(config, mesh, launch, stop=stop, where=where)
    return 0


def options(args: argparse.Namespace) -> list[str]:
    stop = [] if args.stop_after is None else [f"--stop-after={args.stop_after}"]
    return [*stop, *(["--fresh"] if args.fresh else [])]


COMMAND = Command("train, or resume, a run", add_arguments, run)
