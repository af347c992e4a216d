"""`weft launch`: start a run's processes, on this machine or on those that Slurm gives."""

import argparse
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from launch.command import Command, config_arguments
from launch.commands.train import checked, run_arguments, start
from trainer.signals import Stop

if TYPE_CHECKING:
    from trainer.config import RunConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from launch import group, slurm

    config_arguments(parser)
    run_arguments(parser)
    group.add_arguments(parser)
    slurm.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    with Stop() as stop:
        from launch import slurm
        from launch.group import group

        if args.slurm:
            return queue(args, checked(args))
        slurm.refuse_without_slurm(args)
        config = checked(args)
        return start(args, config, group(args, config.mesh), stop)


def queue(args: argparse.Namespace, config: "RunConfig") -> int:
    """Submit the run as a job, or show the script."""
    from configs.structure import to_plain
    from configs.text import dump_yaml
    from launch import slurm
    from launch.group import processes
    from trainer.checkpoint import FOLDER, name_of

    if args.nproc is None:
        args.nproc = args.gpus_per_node
    last = min(config.train.steps, args.stop_after or config.train.steps)
    job = slurm.job(
        args, Path(config.run.dir), f"{FOLDER}/{name_of(last)}", processes(args, config.mesh), dict(os.environ)
    )
    script = slurm.render(job, " ".join(shlex.join(["weft", *sys.argv[1:]]).split()))
    if args.dry_run:
        print(script, end="")
        return 0
    number = slurm.submit(job, script, dump_yaml(to_plain(config)), dict(os.environ))
    print(f"submitted job {number}; its script, code and config are in {job.folder}, its output will be {number}.out")
    return 0


COMMAND = Command("start a run here, or on machines of a Slurm cluster", add_arguments, run)
