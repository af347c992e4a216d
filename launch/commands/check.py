"""`weft check`: does a mesh compute what one process computes, for the model of a config?"""

import argparse
import json

from launch.command import Command, config_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    config_arguments(parser)
    parser.add_argument("--mesh", required=True, help='such as "tp=2,pp=2,schedule=zbv"')
    parser.add_argument("--dtype", choices=("float64", "float32"), default="float64", help="default: %(default)s")
    parser.add_argument("--length", type=int, default=19, help="tokens of a sequence (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="every error, as JSON")


def run(args: argparse.Namespace) -> int:
    import torch

    from launch.runs import load_run
    from parallel import check
    from parallel.mesh import MeshConfig

    mesh = MeshConfig.parse(args.mesh)
    config = load_run(args.config, args.overrides)
    report = check.run(config.model, mesh, check.Settings(length=args.length, dtype=getattr(torch, args.dtype)))
    if args.json:
        print(json.dumps(report.as_dict(), indent=2))
    elif report.ok:
        worst = max(report.gradients.values(), default=0.0)
        print(f"{mesh} equals one process: loss to {report.loss:.1e}, every gradient to {worst:.1e}")
    else:
        print(f"{mesh} differs from one process:", *report.wrong, sep="\n  ")
    return 0 if report.ok else 1


COMMAND = Command("compare a config on a mesh with one process", add_arguments, run)
