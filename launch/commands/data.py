"""`weft data`: look at prepared data."""

import argparse
from types import MappingProxyType

from launch.command import Command


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="DATA", help="folder of prepared data, or the prefix of a .bin/.idx pair")


def show(args: argparse.Namespace) -> int:
    from trainer.data.show import describe

    for line in describe(args.path):
        print(line)
    return 0


def verify(args: argparse.Namespace) -> int:
    from trainer.data.check import verify

    for line in verify(args.path):
        print(line)
    return 0


COMMAND = MappingProxyType(
    {
        "show": Command("say what prepared data hold: counts, tokenizer, first and last text", arguments, show),
        "verify": Command(
            "read prepared data whole: hashes, counts, and every token in the vocabulary", arguments, verify
        ),
    }
)
