"""`weft prepare`: text files to the tokens that `data.train` and `data.valid` name."""

import argparse

from launch.command import Command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", metavar="OUT", help="folder to write; must not exist")
    parser.add_argument("sources", metavar="SOURCE", nargs="+", help="folder, file or glob")
    parser.add_argument("--suffix", action="append", help="of the files taken from folders (default: .txt .md .py)")
    parser.add_argument("--tokenizer", metavar="FILE", help="a SentencePiece model (default: train one)")
    parser.add_argument("--vocab-size", type=int, default=8192, help="of the trained tokenizer (default: %(default)s)")
    parser.add_argument("--valid-bytes", type=int, default=200_000, help="about how much to hold out (%(default)s)")


def run(args: argparse.Namespace) -> int:
    from trainer.data.prepare import PrepareConfig, prepare
    from trainer.data.tokenizer import TokenizerConfig

    tokenizer = args.tokenizer or TokenizerConfig(args.vocab_size)
    suffixes = tuple(args.suffix) if args.suffix else PrepareConfig.suffixes
    manifest = prepare(PrepareConfig(tuple(args.sources), tokenizer, suffixes, args.valid_bytes), args.out)
    for name, split in manifest["splits"].items():
        print(f"{args.out}/{name}: {split['documents']} documents, {split['tokens']:,} tokens")
    return 0


COMMAND = Command("turn text files into tokens to train on", add_arguments, run)
