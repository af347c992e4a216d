"""`weft prepare`: text files to the tokens that `data.train` and `data.valid` name."""

import argparse
import os

from launch.command import Command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", metavar="OUT", help="folder to write; an interrupted call goes on where it stopped")
    parser.add_argument("sources", metavar="SOURCE", nargs="+", help="folder, file or glob: text, JSON lines, Parquet")
    parser.add_argument("--suffix", action="append", help="of the files taken from folders (default: all known)")
    parser.add_argument("--text-key", default="text", help="where JSON lines and Parquet have text (%(default)s)")
    parser.add_argument(
        "--tokenizer", metavar="PATH", help="SentencePiece model or Hugging Face folder (default: train)"
    )
    parser.add_argument(
        "--eod", metavar="TOKEN", help="ends documents (default: the Hugging Face tokenizer's eos_token)"
    )
    parser.add_argument("--vocab-size", type=int, default=8192, help="of the trained tokenizer (default: %(default)s)")
    parser.add_argument("--tokenizer-kind", default="bpe", help="of the trained tokenizer: bpe (default) or unigram")
    parser.add_argument("--sample-bytes", type=int, default=32_000_000, help="text to train it on (%(default)s)")
    parser.add_argument("--valid-bytes", type=int, help="about how much to hold out (default: 200000)")
    parser.add_argument("--valid-fraction", type=float, help="instead, what part of the documents to hold out")
    parser.add_argument("--workers", type=int, help="processes (default: one per core)")


def run(args: argparse.Namespace) -> int:
    from trainer.data.prepare import PrepareConfig, prepare
    from trainer.data.tokenizers.sentencepiece import TokenizerConfig

    config = PrepareConfig(
        tuple(args.sources),
        args.tokenizer or TokenizerConfig(args.vocab_size, args.tokenizer_kind, args.sample_bytes),
        tuple(args.suffix) if args.suffix else None,
        args.valid_bytes,
        args.valid_fraction,
        args.text_key,
        args.eod,
    )
    workers = len(os.sched_getaffinity(0)) if args.workers is None else args.workers
    manifest = prepare(config, args.out, workers=workers)
    for name, split in manifest["splits"].items():
        print(f"{args.out}/{name}: {split['documents']:,} documents, {split['tokens']:,} tokens")
    if manifest["skipped"]:
        print(f"documents passed over, because they are empty or not UTF-8: {manifest['skipped']:,}")
    return 0


COMMAND = Command("turn text files into tokens to train on", add_arguments, run)
