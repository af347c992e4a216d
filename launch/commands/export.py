"""`weft export`: a run's newest checkpoint as a folder that Hugging Face transformers loads without Weft."""

import argparse
from pathlib import Path

from launch.command import Command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="folder of a run or of a checkpoint, or a run's config")
    parser.add_argument("out", metavar="OUT", help="folder to write; must be new or empty")
    parser.add_argument("--tokenizer", metavar="PATH", help="default: the run's data.tokenizer")
    formats = "native (a model of transformers' own), self-contained (with code), or auto (native where exact; default)"
    parser.add_argument("--format", default="auto", help=formats)
    parser.add_argument("--dtype", help="of the saved parameters, such as bfloat16 (default: their own)")


def run(args: argparse.Namespace) -> int:
    from launch.runs import newest_checkpoint, run_folder
    from models.hf.export import ExportConfig, export

    config, content, path = newest_checkpoint(run_folder(args.run))
    options = ExportConfig(
        tokenizer=args.tokenizer or config.data.tokenizer,
        max_length=config.data.sequence_length,
        dtype=args.dtype,
        format=args.format,
    )
    form = export(config.model, content.model, Path(args.out), options)
    print(f"{args.out}: {path.name} of {args.run} as {form.label}, reloaded by transformers with the same logits")
    return 0


COMMAND = Command("write a run as a Hugging Face folder", add_arguments, run)
