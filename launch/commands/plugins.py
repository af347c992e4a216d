"""`weft plugins`: what can stand in each slot of a model and of its training."""

import argparse
import dataclasses
import inspect
import json
import textwrap
from pathlib import Path
from typing import Any

from launch.command import Command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("slot", metavar="SLOT", nargs="?", help="such as mixer (default: all slots)")
    parser.add_argument("--json", action="store_true", help="with the fields of every kind")


def run(args: argparse.Namespace) -> int:
    rows = [row for slot in chosen(args.slot) for row in describe(slot)]
    print(json.dumps(rows, indent=2) if args.json else table(rows))
    return 0


def chosen(name: str | None) -> list[Any]:
    """The slot's base class, or all of them."""
    from configs.errors import did_you_mean
    from configs.structure import slots_in
    from trainer.config import RunConfig

    known = {cls.slot: cls for cls in slots_in(RunConfig)}
    if name is None:
        return list(known.values())
    if name not in known:
        raise ValueError(f"there is no slot {name!r}; {did_you_mean(name, known)}the slots are {', '.join(known)}")
    return [known[name]]


def describe(slot: Any) -> list[dict[str, Any]]:
    """Every kind of a slot: its summary, its file as it would be imported, and its fields."""
    from configs.schema import field_words
    from configs.structure import to_plain
    from configs.validate import default_of, required

    rows = []
    for kind, cls in slot.kinds().items():
        words = field_words(cls)
        fields = [
            {"name": field.name, "help": words.get(field.name, "")}
            | ({} if required(field) else {"default": to_plain(default_of(field))})
            for field in dataclasses.fields(cls)
        ]
        # Where a docstring begins with the fields, its file's first sentence says what the kind is.
        summary = words[""] or (inspect.getdoc(inspect.getmodule(cls)) or "").partition("\n")[0]
        rows.append(
            {"slot": slot.slot, "kind": kind, "summary": summary, "file": inspect.getfile(cls), "fields": fields}
        )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """One line per kind under a line per slot."""
    width = max((len(row["kind"]) for row in rows), default=0)
    lines, slot = [], None
    for row in rows:
        if row["slot"] != slot:
            slot = row["slot"]
            lines += ["", slot] if lines else [slot]
        file = Path(row["file"])
        shown = file.relative_to(Path.cwd()) if file.is_relative_to(Path.cwd()) else file
        summary = textwrap.shorten(row["summary"], 90, placeholder=" ...")
        lines.append(f"  {row['kind']:{width}}  {summary:90}  {shown}")
    return "\n".join(lines)


COMMAND = Command("list the plug-ins of every slot, or of one", add_arguments, run)
