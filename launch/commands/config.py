"""`weft config`: look at a config before it runs."""

import argparse
import json
import sys
from pathlib import Path
from types import MappingProxyType

from launch.command import Command, config_arguments


def show(args: argparse.Namespace) -> int:
    from configs.structure import to_plain
    from configs.text import dump_yaml
    from launch.runs import load_run

    print(dump_yaml(to_plain(load_run(args.config, args.overrides))), end="")
    return 0


def validate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("configs", metavar="CONFIG", nargs="+", help="YAML files of runs")


def validate(args: argparse.Namespace) -> int:
    from launch.runs import load_run

    code = 0
    for file in args.configs:
        try:
            load_run(file)
        except ValueError as error:
            named = str(error) if str(error).startswith(file) else f"{file}: {error}"
            print(f"weft: {named}", file=sys.stderr)
            code = 2
        else:
            print(f"{file}: ok")
    return code


def schema_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--files", action="store_true", help="of files with a base, in which nothing is required")
    parser.add_argument("-o", "--output", metavar="FILE", help="default: the standard output")


def write_schema(args: argparse.Namespace) -> int:
    from configs.schema import of_files, schema
    from trainer.config import RunConfig

    whole = schema(RunConfig, "Weft run")
    text = json.dumps(of_files(whole) if args.files else whole, indent=2) + "\n"
    if args.output is None:
        print(text, end="")
    else:
        Path(args.output).write_text(text, encoding="utf-8")
    return 0


COMMAND = MappingProxyType(
    {
        "show": Command("print a config as it would run, with every default", config_arguments, show),
        "validate": Command("check configs without running them", validate_arguments, validate),
        "schema": Command("write the JSON schema of configs, for editors", schema_arguments, write_schema),
    }
)
