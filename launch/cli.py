"""`weft`: the command line. Every command is a file of `launch/commands/`.

What a user did wrong is one sentence on stderr and exit code 2, and a command that broke down before its verdict is one
with exit code 3; with WEFT_TRACEBACK=1 also where it was found.
"""

import importlib
import os
import pkgutil
import sys
import traceback
from collections.abc import Mapping, Sequence

from configs.errors import did_you_mean, sentence
from launch import commands
from launch.command import Command, Parser, UnfinishedError, UsageError

Commands = Mapping[str, "Command | Commands"]


def find_commands() -> Commands:
    """By name, in alphabetical order."""
    names = sorted(info.name for info in pkgutil.iter_modules(commands.__path__))
    modules = {name: importlib.import_module(f"{commands.__name__}.{name}") for name in names}
    return {name.replace("_", "-"): module.COMMAND for name, module in modules.items()}


def overview(prog: str, known: Commands) -> str:
    """The commands with a line each."""
    lines = [f"usage: {prog} COMMAND ...", ""]
    for name, command in known.items():
        parts = {name: command} if isinstance(command, Command) else {f"{name} {k}": c for k, c in command.items()}
        lines += [f"  {part:16} {c.help if isinstance(c, Command) else ''}".rstrip() for part, c in parts.items()]
    return "\n".join([*lines, "", f"{prog} COMMAND --help tells more about one."])


def dispatch(prog: str, known: Commands, arguments: Sequence[str]) -> int:
    """Run the command that the first of `arguments` names."""
    if not arguments:
        raise UsageError(f"no command given; the commands are {', '.join(known)}; see {prog} --help")
    name, rest = arguments[0], arguments[1:]
    if name in ("-h", "--help"):
        print(overview(prog, known))
        return 0
    if name not in known:
        raise UsageError(
            f"unknown command '{prog} {name}'; {did_you_mean(name, known)}the commands are {', '.join(known)}"
        )
    command = known[name]
    if not isinstance(command, Command):
        return dispatch(f"{prog} {name}", command, rest)
    parser = Parser(prog=f"{prog} {name}", description=command.help, allow_abbrev=False)
    command.add_arguments(parser)
    return command.run(parser.parse_intermixed_args(rest))


def said_elsewhere(text: str) -> bool:
    """Whether this is a process of several, and rank 0 says the same."""
    if "RANK" not in os.environ:
        return False
    # It takes seconds to import torch, which most refusals do without.
    from trainer.refusals import said_by_main

    return said_by_main(text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `weft` with these arguments (default: the process's) and return the exit code."""
    try:
        return dispatch("weft", find_commands(), sys.argv[1:] if arguments is None else arguments)
    except BrokenPipeError:
        # Whoever reads the output has seen enough; what is left in the buffer must not fail at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, FloatingPointError, UnfinishedError) as error:
        if os.environ.get("WEFT_TRACEBACK") == "1":
            traceback.print_exc()
        rank, text = os.environ.get("RANK", "0"), sentence(error)
        who = "weft" if rank == "0" else f"weft (rank {rank})"
        if not said_elsewhere(text):
            print(f"{who}: {text}", file=sys.stderr)
        return 3 if isinstance(error, UnfinishedError) else 2
    except KeyboardInterrupt:
        print("weft: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
