"""`weft ckpt`: look at checkpoints, in one process, wherever they were written."""

import argparse
import json
import sys
from pathlib import Path
from types import MappingProxyType
from typing import Any

from launch.command import Command

WHAT = "folder of a run, or of a checkpoint, or a run's config"


def list_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="RUN_OR_CKPT", help=WHAT)
    parser.add_argument("--json", action="store_true", help="as JSON")


def ls(args: argparse.Namespace) -> int:
    """Exit code 1 if one is damaged, as far as sizes tell."""
    from launch.runs import checkpoints
    from trainer.checkpoint import damage

    found = checkpoints(args.path)
    rows = [
        {"step": step, "path": str(path), "bytes": size_of(path), "damage": damage(path, hashes=False)}
        for step, path in found.items()
    ]
    if args.json:
        print(json.dumps(rows, indent=2))
    else:
        for row in rows:
            state = "complete" if row["damage"] is None else f"damaged: {row['damage']}"
            print(f"{row['step']:>10}  {shown_bytes(row['bytes']):>10}  {state}  {row['path']}")
    return int(any(row["damage"] for row in rows))


def verify(args: argparse.Namespace) -> int:
    """Exit code 1 if one is damaged."""
    from rich.console import Console

    from launch.runs import checkpoints
    from trainer.checkpoint import damage
    from trainer.progress import counting_bytes

    found = checkpoints(args.path)
    verdicts = []
    total = sum(size_of(path) for path in found.values())
    with counting_bytes(Console(file=sys.stderr), "verifying", total) as advance:
        for step, path in found.items():
            reason = damage(path, tell=advance)
            verdicts.append({"step": step, "path": str(path), "damage": reason})
    if args.json:
        print(json.dumps(verdicts, indent=2))
    else:
        for verdict in verdicts:
            print(f"{verdict['path']}: {'ok' if verdict['damage'] is None else 'damaged: ' + verdict['damage']}")
    return int(any(verdict["damage"] for verdict in verdicts))


def show(args: argparse.Namespace) -> int:
    from configs.text import dump_yaml
    from launch.runs import checkpoints
    from trainer.checkpoint import damage, read

    path = list(checkpoints(args.path).values())[-1]
    if reason := damage(path, hashes=False):
        raise ValueError(f"checkpoint {path} is damaged ({reason}); weft ckpt ls shows which are complete")
    content = read(path)
    # One tensor at a time, so that a model larger than this machine's memory can be looked at.
    tensors = [describe(name, content.model[name]) for name in content.model]
    kept = sorted({name.rpartition("/")[2] for name in content.optimizer})
    if args.json:
        about = {"path": str(path), "state": vars(content.state), "mesh": content.mesh, "optimizer": kept}
        print(json.dumps({**about, "tensors": tensors, "config": content.config}, indent=2))
        return 0
    print(f"{path}: {', '.join(f'{key} {value:,}' for key, value in vars(content.state).items())}")
    print(f"written on: {content.mesh}; {shown_bytes(size_of(path))}; optimiser state: {', '.join(kept) or 'none'}\n")
    print(dump_yaml(content.config))
    width = max((len(tensor["name"]) for tensor in tensors), default=0)
    for tensor in tensors:
        shape = "x".join(str(size) for size in tensor["shape"]) or "scalar"
        print(f"{tensor['name']:{width}}  {shape:>14}  {tensor['dtype']:>8}  norm {tensor['norm']:.6g}")
    elements = sum(tensor["elements"] for tensor in tensors)
    print(f"{len(tensors)} parameters and buffers, {elements:,} elements")
    return 0


def describe(name: str, value: Any) -> dict[str, Any]:
    """What is shown of one tensor."""
    return {
        "name": name,
        "shape": list(value.shape),
        "dtype": str(value.dtype).removeprefix("torch."),
        "elements": value.numel(),
        "norm": float(value.double().norm()),
    }


def size_of(path: Path) -> int:
    return sum(file.stat().st_size for file in path.iterdir() if file.is_file())


def shown_bytes(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


COMMAND = MappingProxyType(
    {
        "ls": Command("list a run's checkpoints: steps, sizes, whether files are missing", list_arguments, ls),
        "verify": Command("compare every file of checkpoints with its hash", list_arguments, verify),
        "show": Command("show a checkpoint's tensors, config and mesh", list_arguments, show),
    }
)
