"""`weft bench`: how fast a config trains on this machine."""

import argparse
import dataclasses
import json
import os

from launch.command import Command, config_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    config_arguments(parser)
    parser.add_argument("--steps", type=int, default=10, help="optimiser steps that are timed (default: 10)")
    parser.add_argument("--warmup", type=int, default=3, help="steps before those (default: 3)")
    parser.add_argument("--json", action="store_true", help="one line of JSON")


def run(args: argparse.Namespace) -> int:
    from launch.group import Group
    from launch.runs import load_run
    from trainer.preflight import refuse_machine

    config = load_run(args.config, args.overrides)
    refuse_machine(config)
    group = Group(nproc=config.mesh.world_size)
    if "WORLD_SIZE" not in os.environ and not group.alone:
        from launch import agent

        options = [f"--steps={args.steps}", f"--warmup={args.warmup}", *(["--json"] if args.json else [])]
        return agent.work(group, ["-m", "launch.cli", "bench", args.config, *args.overrides, *options])

    from trainer.bench import bench
    from trainer.process import joined
    from trainer.whereabouts import Whereabouts

    with joined(config.mesh, config.train.timeout, Whereabouts("bench")) as mesh:
        found = bench(config, mesh, args.steps, args.warmup)
        if mesh.is_main and args.json:
            print(json.dumps(dataclasses.asdict(found)))
        elif mesh.is_main:
            print(
                f"{found.tokens_per_s:,.0f} tokens/s, MFU {found.mfu:.1%} of {found.peak_flops / 1e12:.2f} TFLOP/s per "
                f"rank, peak memory {found.memory_gib:.2f} GiB, {found.seconds_per_step:.3f} s per step, "
                f"{found.parameters:,} parameters"
            )
    return 0


COMMAND = Command("measure how fast a config trains here", add_arguments, run)
