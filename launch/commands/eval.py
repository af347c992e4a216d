"""`weft eval`: the loss of a model on held-out data or any text, or its answers to a synthetic task.

Given a mesh of several ranks it starts the processes itself, as `weft train` does.
"""

import argparse
import json
import os

from launch.command import Command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run", metavar="MODEL", help="folder of a run, a checkpoint or a Hugging Face export; or a run's config"
    )
    parser.add_argument("texts", metavar="TEXT", nargs="*", help="file, folder or glob of text, JSON lines, Parquet")
    parser.add_argument("--task", metavar="KIND", help="a synthetic task instead, such as mqar num_pairs=8")
    parser.add_argument("--data", metavar="PREFIX", help="of a .bin/.idx pair (default: the run's data.valid)")
    parser.add_argument("--text-key", metavar="KEY", help="where JSON lines and Parquet have text (default: text)")
    parser.add_argument("--tokenizer", metavar="PATH", help="for text (default: the model's)")
    parser.add_argument("--window", type=int, metavar="T", help="tokens of a sequence (default: as trained)")
    parser.add_argument("--stride", type=int, metavar="S", help="windows overlap by T - S tokens (default: not)")
    parser.add_argument("--limit", type=int, metavar="N", help="the first N sequences only")
    parser.add_argument("--micro-batch", type=int, metavar="N", help="sequences at once (default: as trained)")
    parser.add_argument("--mesh", help="such as dp=2 (default: one process; under torchrun the run's)")
    parser.add_argument("--trust-remote-code", action="store_true", help="run the code in an export that is not Weft's")
    parser.add_argument("--json", action="store_true", help="one line of JSON")


def run(args: argparse.Namespace) -> int:
    if args.task is not None:
        return examined(args)
    from launch.runs import run_folder
    from parallel.mesh import MeshConfig
    from trainer import evaluation
    from trainer.preflight import refuse_evaluation

    request = evaluation.Request(
        run_folder(args.run),
        tuple(args.texts),
        args.data,
        args.text_key or "text",
        args.tokenizer,
        args.window,
        args.stride,
        args.limit,
        args.micro_batch,
        args.trust_remote_code,
    )
    if args.mesh is not None and "WORLD_SIZE" not in os.environ:
        mesh = MeshConfig.parse(args.mesh)
        if mesh.world_size > 1:
            from launch import agent
            from launch.group import Group

            # Here, since the processes would each report it.
            refuse_evaluation(request, mesh)
            words = ["-m", "launch.cli", "eval", args.run, *args.texts, *options(args)]
            return agent.work(Group(nproc=mesh.world_size), words)
    report = evaluation.run(request, args.mesh)
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(report.as_dict()) if args.json else report)
    return 0


def examined(args: argparse.Namespace) -> int:
    """Answers to a task; what would be text elsewhere are its settings."""
    for name in ("data", "text_key", "tokenizer", "stride", "mesh"):
        if getattr(args, name) is not None:
            raise ValueError(
                f"both --task and --{name.replace('_', '-')} are given; a task makes its own examples and runs on one "
                f"process, leave --{name.replace('_', '-')} out"
            )
    from launch.runs import run_folder
    from trainer import examination

    report = examination.run(
        examination.Request(
            run_folder(args.run),
            args.task,
            tuple(args.texts),
            args.window,
            args.limit,
            args.micro_batch,
            args.trust_remote_code,
        )
    )
    print(json.dumps(report.as_dict()) if args.json else report)
    return 0


def options(args: argparse.Namespace) -> list[str]:
    """Those that were given, for the processes of a mesh."""
    names = ("mesh", "data", "text_key", "tokenizer", "window", "stride", "limit", "micro_batch")
    given = {name: getattr(args, name) for name in names}
    words = [f"--{name.replace('_', '-')}={value}" for name, value in given.items() if value is not None]
    return [*words, *(["--json"] if args.json else [])]


COMMAND = Command("evaluate a model: loss, perplexity, bits per byte", add_arguments, run)
