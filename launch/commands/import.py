"""`weft import`: a model in Hugging Face's format as a run at step 0, to be trained on, evaluated or exported."""

import argparse
from pathlib import Path

from launch.command import Command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="HF_FOLDER", help="with config.json and safetensors, of Llama, say")
    parser.add_argument("out", metavar="OUT", help="folder to write; must be new or empty")
    parser.add_argument("--no-check", action="store_true", help="do not compare the logits with those of transformers")


def run(args: argparse.Namespace) -> int:
    from trainer.imported import describe, import_model

    read = import_model(Path(args.source), Path(args.out), verify=not args.no_check)
    checked = "not compared with transformers" if args.no_check else "with the same logits as in transformers"
    print(f"{args.out}: {args.source} as a {read.architecture.kind}, {describe(read.config)}, {checked}")
    return 0


COMMAND = Command("take up a Hugging Face model, to train it on", add_arguments, run)
