"""How a run chooses among implementations."""

import importlib.util
import subprocess
import sys
from typing import Any

import pytest
import torch

from models.kernels import op
from models.kernels.depth_mix import DepthMix
from tests.contract.tiny import build
from trainer import kernels

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(params=[True, False], ids=["installed", "missing"])
def there(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether Triton is installed."""
    found = object() if request.param else None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    return request.param


def test_auto_goes_by_the_device(there: bool) -> None:
    plain = "head reference, linear reference"
    chosen = kernels.chosen(build(residual="mudd"), "auto", CPU, torch.float32)
    assert kernels.line(chosen) == f"kernels: attention blocks, depth_mix reference, {plain}, rms_norm rows"
    chosen = kernels.chosen(build(residual="mudd"), "auto", GPU, torch.float32)
    reason = " (triton: Triton is not installed (pip install 'weft[triton]'))"
    mixed = "triton" if there else "reference" + reason
    assert kernels.line(chosen) == f"kernels: attention sdpa, depth_mix {mixed}, {plain}, rms_norm torch"


def test_what_cannot_be_called_is_refused(there: bool) -> None:
    sentence = "need a GPU, or TRITON_INTERPRET=1" if there else "is not installed"
    with pytest.raises(
        ValueError, match=f"kernels.depth_mix is triton, and Triton.*{sentence}.*; use auto or reference"
    ):
        kernels.chosen(build(residual="mudd"), {"depth_mix": "triton"}, CPU, torch.float32)


@pytest.mark.parametrize(
    ("wanted", "sentence"),
    [
        ({"depth_mix": "cuda"}, "kernels.depth_mix is 'cuda'; use one of auto, triton, reference"),
        (
            {"depthmix": "triton"},
            "kernels.depthmix is given, and the model has no operation of this name; it has attention, depth_mix, "
            "head, linear, rms_norm",
        ),
        (
            "cuda",
            "kernels is 'cuda', which no operation of the model has; use one of auto, reference, blocks, sdpa, triton, "
            "float32, float8, rows, torch",
        ),
    ],
)
def test_what_is_not_there_is_refused(wanted: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        kernels.chosen(build(residual="mudd"), wanted, CPU, torch.float32)


@pytest.mark.parametrize(
    ("triton", "numpy", "runs"),
    [("3.6.0", "2.4.6", False), ("3.6.0", "2.3.5", True), ("3.7.0", "2.4.6", True), ("3.10.0+git1", "3.0.0rc1", True)],
)
def test_interpreters_that_cannot_count_are_refused(triton: str, numpy: str, runs: bool) -> None:
    reason = op.without_interpreter(triton, numpy)
    assert runs == (reason is None)
    assert runs or reason == "the interpreter of Triton 3.6.0 takes a NumPy before 2.4, where this is NumPy 2.4.6"


def test_one_word_for_all_and_one_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "without_triton", lambda device: None)
    model = build(residual="hyper", ffn="moe_plus_plus")
    wanted = {"default": "reference", "stream_mix": "triton"}
    found = {name: choice.implementation for name, choice in kernels.chosen(model, wanted, GPU, torch.float32).items()}
    others = ("combine", "handover", "head", "linear", "masked_gate", "normed_product", "permute", "queues")
    library = {"attention": "sdpa", "grouped_mm": "loop", "rms_norm": "torch"}
    assert found == {**dict.fromkeys(others, "reference"), "stream_mix": "triton", **library}


def test_an_operation_that_does_others_too_is_not_chosen_beside_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "without_triton", lambda device: None)
    model = build(residual="hyper")

    def line(**wanted: str) -> str | None:
        return kernels.line(kernels.chosen(model, wanted, GPU, torch.float32))

    assert "handover triton, " in (line() or "")
    assert "handover reference (triton: stream_mix is reference), " in (line(stream_mix="reference") or "")
    assert "handover reference, " in (line(stream_mix="reference", handover="reference") or "")
    for wanted in {"handover": "triton"}, {"default": "triton"}:
        with pytest.raises(
            ValueError, match=r"kernels\.handover is triton, which does normed_product too, and normed_pro"
        ):
            line(**wanted, normed_product="reference")


def test_a_model_is_built_without_torchs_compiler() -> None:
    """Importing it takes longer than all else."""
    program = "import sys, models.lm, models.ffn.moe; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False, timeout=60).returncode == 0


def test_what_is_chosen_is_called() -> None:
    pytest.importorskip("triton")
    one, other = DepthMix(), DepthMix()
    one.choose("triton")
    assert one.call.__module__.endswith("triton") and other.call is DepthMix.reference
    one.choose("reference")
    assert one.call is DepthMix.reference


def test_float8_is_never_taken_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    for wanted, found in (("auto", "reference"), ("float8", "float8")):
        assert kernels.chosen(build(), wanted, GPU, torch.bfloat16)["linear"].implementation == found
    with pytest.raises(
        ValueError, match=r"kernels.linear is float8, and its products are of bfloat16.*float32; use auto"
    ):
        kernels.chosen(build(), {"linear": "float8"}, GPU, torch.float32)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(ValueError, match=r"8\.9 or later, where this has 8\.0; use auto"):
        kernels.chosen(build(), {"linear": "float8"}, GPU, torch.bfloat16)
