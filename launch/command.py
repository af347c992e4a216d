"""What a command of `weft` is, and the parser that all share."""

import argparse
import dataclasses
from collections.abc import Callable
from typing import NoReturn

from configs.errors import did_you_mean


class UsageError(ValueError):
    """The command line itself is wrong."""


class UnfinishedError(Exception):
    """A command that has no verdict, for a reason that is neither its answer nor the user's mistake."""


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence instead of printing the usage, and leaves the exit to its caller."""

    def error(self, message: str) -> NoReturn:
        known = [option for action in self._actions for option in action.option_strings]
        wrong = message.removeprefix("unrecognized arguments: ")
        hint = did_you_mean(wrong.split()[0].split("=")[0], known) if wrong != message else ""
        raise UsageError(f"{message}; {hint}see {self.prog} --help")


@dataclasses.dataclass(frozen=True)
class Command:
    """help: one line. add_arguments: declares them. run: returns the exit code; it raises ValueError for users."""

    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


def config_arguments(parser: argparse.ArgumentParser, holds: str = "YAML file of a run") -> None:
    """CONFIG and its overrides."""
    parser.add_argument("config", metavar="CONFIG", help=holds)
    words = "such as model.layers.A.mixer.num_heads=8"
    parser.add_argument("overrides", metavar="key=value", nargs="*", default=[], help=words)
