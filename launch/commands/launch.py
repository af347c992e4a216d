"""`weft launch`: start a run's processes, on this machine or on those that Slurm gives."""

import argparse

from launch.command import Command, config_arguments
from launch.commands.train import checked, run_arguments, start


def add_arguments(parser: argparse.ArgumentParser) -> None:
    # Imported here, where `weft --help` does not need the mesh.
    from launch import group

    config_arguments(parser)
    run_arguments(parser)
    group.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    from launch.group import group

    config = checked(args)
    return start(args, config, group(args, config.mesh))


COMMAND = Command("start a run here, or on machines of a Slurm cluster", add_arguments, run)
