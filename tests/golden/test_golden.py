"""Every golden file against our code: outputs and all gradients, in float64.

A mechanism's file `tests/golden/<mechanism>.py` is found by the name of the folder of its cases, and defines

    run(inputs, params, config) -> {output name: tensor}

as a differentiable function of the case's inputs and parameters. WEFT_GOLDEN names another folder of cases, laid out
as `<mechanism>/<case>.safetensors`; see docs/golden.md for the keys inside.
"""

import importlib
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

HERE = Path(__file__).parent
ROOT = Path(os.environ.get("WEFT_GOLDEN") or HERE / "cases")
TOLERANCE = 1e-9  # float64: two orders of summation differ by about 1e-14 at these sizes; a wrong formula by 1e-3


def mechanisms() -> set[str]:
    return {path.stem for path in HERE.glob("*.py")} - {"__init__", "layers", "test_golden"}


def test_every_folder_is_known() -> None:
    """Numbers without a mechanism would be passed over in silence."""
    assert {path.name for path in ROOT.iterdir() if path.is_dir()} <= mechanisms()


def cases() -> list[Path]:
    return sorted(path for path in ROOT.glob("*/*.safetensors") if path.parent.name in mechanisms())


def load(path: Path) -> tuple[dict[str, torch.Tensor], dict]:
    with safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, json.loads(file.metadata()["config"])


def leaves(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {
        key.removeprefix(prefix): value.clone().requires_grad_(value.is_floating_point())
        for key, value in tensors.items()
        if key.startswith(prefix)
    }


@pytest.mark.parametrize("path", cases(), ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_case(path: Path) -> None:
    tensors, config = load(path)
    inputs, params = leaves(tensors, "in."), leaves(tensors, "param.")
    outs = importlib.import_module(f"tests.golden.{path.parent.name}").run(inputs, params, config)
    expected = {key.removeprefix("out."): value for key, value in tensors.items() if key.startswith("out.")}
    assert outs.keys() == expected.keys()
    total = torch.zeros((), dtype=torch.float64, requires_grad=True)  # some cases have no cotangents
    for name, value in expected.items():
        torch.testing.assert_close(outs[name], value, rtol=TOLERANCE, atol=TOLERANCE, msg=lambda m, n=name: f"{n}: {m}")
        if f"cotangent.{name}" in tensors:
            total = total + (outs[name] * tensors[f"cotangent.{name}"]).sum()
    known = {f"in.{name}": leaf for name, leaf in inputs.items()} | {
        f"param.{name}": leaf for name, leaf in params.items()
    }
    known = {name: leaf for name, leaf in known.items() if leaf.requires_grad}
    gradients = torch.autograd.grad(total, list(known.values()), allow_unused=True)
    for (name, leaf), gradient in zip(known.items(), gradients, strict=True):
        reference = tensors.get(f"grad.{name}", torch.zeros_like(leaf))
        gradient = torch.zeros_like(leaf) if gradient is None else gradient
        torch.testing.assert_close(
            gradient, reference, rtol=TOLERANCE, atol=TOLERANCE, msg=lambda m, n=name: f"gradient of {n}: {m}"
        )


def test_no_built_mechanism_is_without_cases() -> None:
    folders = {path.name for path in (HERE / "cases").iterdir()}
    assert mechanisms() == folders
