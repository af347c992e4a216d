"""`weft convert`: a plain model as one whose residual can be undone, distilled from the plain one.

Given a mesh of several ranks it starts the processes itself, as `weft train` does.
"""

import argparse
import dataclasses
import json
import os
import sys
from pathlib import Path

from launch.command import Command

STEPS = 500


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="folder of a run or of a checkpoint, or a run's config")
    parser.add_argument("out", metavar="OUT", help="folder to write; must be new or empty")
    words = "such as model.residual.grid_bits=14 or optim.lr=1e-4"
    parser.add_argument("overrides", metavar="key=value", nargs="*", default=[], help=words)
    parser.add_argument("--residual", metavar="KIND", required=True, help="such as midpoint_smoothed or reversible")
    parser.add_argument("--steps", type=int, default=STEPS, metavar="N", help="of distillation (default: %(default)s)")
    words = "of fitting each layer by itself before that, if the residual can (default: a quarter as many if it pays)"
    parser.add_argument("--fit", type=int, metavar="N", help=words)
    words = "iterations of the fixed point that it goes by; 1 is the paper's (default: its limit)"
    parser.add_argument("--estimate", type=int, metavar="N", help=words)
    parser.add_argument("--limit", type=int, metavar="N", help="evaluate on the first N held-out sequences only")
    parser.add_argument("--mesh", help="such as fsdp=2 (default: one process; under torchrun the run's)")
    parser.add_argument("--json", action="store_true", help="the losses as one line of JSON")


def run(args: argparse.Namespace) -> int:
    from launch.runs import run_folder
    from parallel.mesh import MeshConfig
    from trainer.conversion import Request, plan

    request = Request(
        run_folder(args.run),
        Path(args.out),
        args.residual,
        args.steps,
        tuple(args.overrides),
        limit=args.limit,
        fit=args.fit,
        estimate=args.estimate,
    )
    mesh = None if args.mesh is None and "WORLD_SIZE" in os.environ else MeshConfig.parse(args.mesh or "")
    main = os.environ.get("RANK", "0") == "0"
    spread = mesh is not None and mesh.world_size > 1 and "WORLD_SIZE" not in os.environ

    def warn(text: str) -> None:
        if main:
            print(f"weft: warning: {text}", file=sys.stderr)

    planned = plan(request, mesh, warn, hashes=not spread)
    if spread:
        from launch import agent
        from launch.group import Group

        words = ["-m", "launch.cli", "convert", args.run, args.out, *args.overrides, *options(args)]
        return agent.work(Group(nproc=planned.work.mesh.world_size), words)
    from rich.console import Console

    from trainer.convert import convert
    from trainer.process import joined
    from trainer.whereabouts import Whereabouts

    console = Console(stderr=True, quiet=not main, force_terminal=None if main else False)
    work = planned.work
    with joined(work.mesh, work.train.timeout, Whereabouts("conversion")) as joint:
        report = convert(
            planned,
            joint,
            request,
            console,
            lambda text: print(text, flush=True) if main and not args.json else None,
            warn,
        )
    if main:
        print(json.dumps(dataclasses.asdict(report)) if args.json else f"saved {args.out}")
    return 0


def options(args: argparse.Namespace) -> list[str]:
    """Those that were given, for the processes of a mesh."""
    given = {name: getattr(args, name) for name in ("residual", "steps", "fit", "estimate", "limit", "mesh")}
    words = [f"--{name}={value}" for name, value in given.items() if value is not None]
    return [*words, *(["--json"] if args.json else [])]


COMMAND = Command("give a plain model a residual that can be undone, and distil it", add_arguments, run)
