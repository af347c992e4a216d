"""`weft check`: does a mesh compute what one process computes, for the model and the optimiser of a config?

Of the config only `model` counts, and `optim` where there is one: the mesh is the command's, and the data are made up.
"""

import argparse
import dataclasses
import functools
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

from launch.command import Command, UnfinishedError, config_arguments

if TYPE_CHECKING:
    from models.config import LMConfig
    from parallel.check import Report, Settings
    from parallel.mesh import MeshConfig

SHOWN = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    config_arguments(parser, "YAML file of a run, or one with a model alone")
    parser.add_argument("--mesh", required=True, help='such as "tp=2,pp=2,schedule=zbv"')
    parser.add_argument("--dtype", choices=("float64", "float32"), default="float64", help="default: %(default)s")
    parser.add_argument("--length", type=int, default=19, help="tokens of a sequence (default: %(default)s)")
    parser.add_argument("--compile", action="store_true", help="the mesh's side under torch.compile, as train.compile")
    parser.add_argument("--json", action="store_true", help="every error, as JSON")


def run(args: argparse.Namespace) -> int:
    from parallel import check

    config, mesh, settings = asked(args)
    try:
        report = check.run(config, mesh, settings)
    except Exception as error:
        # Not a refusal any more, whatever its type. And Python's own exit code for a crash, 1, would say that the mesh
        # computes something else.
        raise UnfinishedError(f"check could not finish: {reason(error)}") from error
    if args.json:
        print(json.dumps(report.as_dict(), indent=2))
    else:
        print(*summary(report), sep="\n")
    return 0 if report.ok else 1


def asked(args: argparse.Namespace) -> "tuple[LMConfig, MeshConfig, Settings]":
    """What is to be compared. Raises ValueError for what is refused, before anything runs."""
    import torch

    from launch.runs import load_memory, load_model, load_optim
    from parallel.check import Settings, refuse_combination
    from parallel.compiled import refuse_compile
    from parallel.mesh import MeshConfig
    from trainer.optim.base import one_step

    mesh = MeshConfig.parse(args.mesh)
    if mesh.world_size == 1:
        raise ValueError(f"--mesh {args.mesh!r} is one process, with nothing to compare; give a mesh such as dp=2")
    if args.length < 1:
        raise ValueError(f"--length is {args.length}; it must be at least 1")
    config = load_model(args.config, args.overrides)
    settings = Settings(
        length=args.length,
        dtype=getattr(torch, args.dtype),
        compile=args.compile,
        memory=load_memory(args.config, args.overrides),
    )
    if args.compile:
        refuse_compile("cpu")
    if (optim := load_optim(args.config, args.overrides, config)) is not None:
        settings = dataclasses.replace(settings, update=functools.partial(one_step, optim))
    refuse_combination(config, mesh, settings)
    return config, mesh, settings


def reason(error: Exception) -> str:
    """What happened; the message of a rank's error is the rank's whole traceback."""
    lines = str(error).strip().splitlines()
    if "Traceback" in str(error):
        return lines[-1]
    text = " ".join(lines)
    return text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"


def summary(report: "Report") -> Iterator[str]:
    """The verdict, what is wrong, and the gradients that differ most."""
    yield f"{report.mesh} {'equals' if report.ok else 'differs from'} one process"
    yield from (f"  {line}" for line in report.wrong[:SHOWN])
    if len(report.wrong) > SHOWN:
        yield f"  and {len(report.wrong) - SHOWN} more; --json lists all"
    yield f"loss {report.loss:.1e}, gradient norm {report.norm:.1e}; of {len(report.gradients)} gradients the worst are"
    yield from (f"  {error:.1e} {name}" for name, error in report.worst())


COMMAND = Command("compare a config on a mesh with one process", add_arguments, run)
