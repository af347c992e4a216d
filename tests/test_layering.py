"""Imports go one way: configs <- models <- parallel <- trainer <- launch, and models/ is single-process code."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAYERS = ("configs", "models", "parallel", "trainer", "launch")
BESIDE = ("tests", "bench", "docs")

# What models/ may import from outside, per folder: kernels are written in Triton, the export knows Hugging Face's
# libraries and tokenizers, everything else is torch alone.
OUTSIDE = {
    "models": {"torch"},
    "models/kernels": {"torch", "triton"},
    "models/hf": {"torch", "huggingface_hub", "safetensors", "sentencepiece", "tokenizers", "transformers"},
}


def imported_names(tree: ast.Module, package: str) -> list[tuple[int, str]]:
    """(line, dotted name) of every import; `package` is the dotted package that the module stands in."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            base = parents[: len(parents) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            names += [(node.lineno, f"{source}.{alias.name}") for alias in node.names]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                names.append((node.lineno, node.args[0].value))
    return names


def distributed_uses(tree: ast.Module) -> list[int]:
    """Lines that reach torch.distributed as an attribute of torch, whatever name torch was imported under."""
    aliases = {"torch"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            aliases |= {alias.asname for alias in node.names if alias.name == "torch" and alias.asname}
    return [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr == "distributed"
        if isinstance(node.value, ast.Name) and node.value.id in aliases
    ]


def violations(path: str, source: str) -> list[str]:
    """What is wrong with the imports of the file at `path`, which is relative to the root and begins with a layer."""
    tree = ast.parse(source, filename=path)
    folders = Path(path).parts[:-1]
    layer = folders[0]
    refused = {*LAYERS[LAYERS.index(layer) + 1 :], *BESIDE}
    found = []
    for line, name in imported_names(tree, ".".join(folders)):
        top = name.split(".")[0]
        if top in refused:
            found.append(f"{path}:{line}: {layer}/ must not import {top}, which is not to its left in {LAYERS}")
        if layer == "models":
            if name == "torch.distributed" or name.startswith("torch.distributed."):
                found.append(f"{path}:{line}: models/ must not import torch.distributed; parallel/ does that")
            prefixes = ["/".join(folders[: depth + 1]) for depth in range(len(folders))]
            allowed = {"models", "configs", *sys.stdlib_module_names}.union(*(OUTSIDE.get(p, set()) for p in prefixes))
            if top not in allowed and top not in refused:
                found.append(f"{path}:{line}: models/ must not import {top}; see OUTSIDE in tests/test_layering.py")
    if layer == "models":
        found += [f"{path}:{line}: models/ must not use torch.distributed" for line in distributed_uses(tree)]
    return found


@pytest.mark.parametrize("layer", LAYERS)
def test_imports_go_one_way(layer: str) -> None:
    found = []
    for file in sorted((ROOT / layer).rglob("*.py")):
        found += violations(file.relative_to(ROOT).as_posix(), file.read_text(encoding="utf-8"))
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("configs/load.py", "import models"),
        ("models/lm.py", "from parallel.mesh import Mesh"),
        ("models/lm.py", "def build():\n    import trainer.loop as loop"),
        ("parallel/apply.py", "import importlib\nimportlib.import_module('trainer.state')"),
        ("trainer/loop.py", "if TYPE_CHECKING:\n    from launch import cli"),
        ("launch/cli.py", "from tests.helpers import pool"),
        ("models/lm.py", "import torch.distributed"),
        ("models/lm.py", "import torch.distributed.tensor as dt"),
        ("models/lm.py", "from torch import distributed as dist"),
        ("models/lm.py", "from torch.distributed import all_reduce"),
        ("models/lm.py", "import torch\nrank = torch.distributed.get_rank()"),
        ("models/lm.py", "import torch as t\nt.distributed.barrier()"),
        ("models/lm.py", "import torch\nwait = torch.distributed\n"),
        ("models/mixers/attention.py", "import einops"),
        ("models/mixers/attention.py", "import triton"),
        ("models/mixers/attention.py", "from ...parallel import mesh"),
    ],
)
def test_planted_violations_are_seen(path: str, source: str) -> None:
    assert violations(path, source)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("configs/load.py", "import yaml"),
        (
            "models/lm.py",
            "import math\nimport torch.nn.functional as F\nfrom configs import base\nfrom models import state",
        ),
        ("models/mixers/attention.py", "from ..state import State\nfrom . import linear"),
        ("models/mixers/attention.py", "class A:\n    distributed = False\n\n\nflag = A.distributed"),
        ("models/kernels/mudd/triton.py", "import triton\nimport triton.language as tl\nimport torch"),
        ("parallel/mesh.py", "import torch.distributed as dist\nfrom models.lm import LM"),
        ("launch/cli.py", "import configs, models, parallel, trainer, launch"),
    ],
)
def test_allowed_imports_pass(path: str, source: str) -> None:
    assert violations(path, source) == []
