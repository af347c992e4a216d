"""Products of bfloat16 numbers in float32, against exact ones."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import Tensor

from models.kernels.grouped_mm import grouped_mm_float32, grouped_mm_loop
from models.kernels.in_float32 import linear_in_float32, slow_in_bfloat16
from models.loss import Vocabulary
from models.params import Linear
from tests.contract.tiny import build
from tests.trainer.runs import prepare_data, records, run, run_config
from trainer import kernels, peak

CPU, GPU = torch.device("cpu"), torch.device("cuda")
HALF_ULP = 2.0**-8  # of bfloat16, relative: what rounding a result changes at most
STEP = 2.0**-23  # of a sum in float32, relative to the sum of its terms' sizes, per term
WITHOUT, WITH = {"avx512_f": True, "avx512_bf16": True, "cpu_name": "Intel Xeon"}, {"amx_tile": True}


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).bfloat16()


def rounded_once(ours: Tensor, right: Tensor, terms: Tensor) -> bool:
    """terms: the sum of the sizes of what a result is the sum of, at most 34."""
    off = 34 * STEP * terms
    return ours.shape == right.shape and bool(
        ((ours.double() - right).abs() <= off + HALF_ULP * (right.abs() + off)).all()
    )


def processor(monkeypatch: pytest.MonkeyPatch, has: Mapping[str, Any]) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: MappingProxyType(dict(has)))


@pytest.mark.parametrize("tokens", [(17,), (2, 5), (1, 1, 3), (0,)])
@pytest.mark.parametrize("bias", [False, True])
def test_outputs_and_gradients_are_rounded_once(tokens: tuple[int, ...], bias: bool) -> None:
    x, weight, grad = draw(*tokens, 33).requires_grad_(), draw(20, 33).requires_grad_(), draw(*tokens, 20)
    extra = draw(20).requires_grad_() if bias else None
    asked = [x, weight] if extra is None else [x, weight, extra]
    out = linear_in_float32(x, weight, extra)
    found = [out.detach(), *torch.autograd.grad(out, asked, grad)]
    assert [one.dtype for one in found] == [torch.bfloat16] * len(found)
    wide = [one.detach().double().requires_grad_() for one in asked]
    size = [one.detach().abs().requires_grad_() for one in wide]
    exact = torch.nn.functional.linear(wide[0], wide[1], wide[2] if bias else None)
    sizes = torch.nn.functional.linear(size[0], size[1], size[2] if bias else None)
    expected = [exact.detach(), *torch.autograd.grad(exact, wide, grad.double())]
    most = [sizes.detach(), *torch.autograd.grad(sizes, size, grad.double().abs())]
    for ours, right, terms in zip(found, expected, most, strict=True):
        assert rounded_once(ours, right, terms)


@pytest.mark.parametrize("counts", [(3, 0, 9, 5), (0, 0, 0, 0)])
def test_products_by_groups_are_rounded_once(counts: tuple[int, ...]) -> None:
    x, weight, grad = draw(sum(counts), 33), draw(len(counts), 33, 21), draw(sum(counts), 21)
    found = gradients(grouped_mm_float32, x, weight, grad, counts)
    exact = gradients(grouped_mm_loop, x.double(), weight.double(), grad.double(), counts)
    x, weight, grad = (one.double().abs() for one in (x, weight, grad))
    sizes = gradients(grouped_mm_loop, x, weight, grad, counts)
    for ours, right, terms in zip(found, exact, sizes, strict=True):
        assert ours.dtype == torch.bfloat16 and rounded_once(ours, right, terms)


def gradients(call: Any, x: Tensor, weight: Tensor, grad: Tensor, counts: tuple[int, ...]) -> list[Tensor]:
    """The output and what it leaves of `grad` for its operands."""
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    out = call(x, weight, torch.tensor(counts))
    return [out.detach(), *torch.autograd.grad(out, [x, weight], grad)]


def test_what_is_kept_for_the_backward_pass_is_bfloat16() -> None:
    kept: list[torch.dtype] = []

    def keep(x: Tensor) -> Tensor:
        kept.append(x.dtype)
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        linear_in_float32(draw(4, 8).requires_grad_(), draw(5, 8).requires_grad_(), None)
    assert kept == [torch.bfloat16] * 2


@pytest.mark.parametrize("learns", [0, 1])
def test_one_operand_alone_learns(learns: int) -> None:
    x, weight = operands = (draw(4, 8), draw(5, 8))
    operands[learns].requires_grad_()
    linear_in_float32(x, weight, None).sum().backward()
    assert [one.grad is not None for one in operands] == [learns == 0, learns == 1]


def test_the_heads_loss_is_that_of_its_logits() -> None:
    head = Vocabulary(40, 16, "head")
    torch.nn.init.normal_(head.weight, generator=torch.Generator().manual_seed(0))
    head.to(torch.bfloat16)
    h, targets = draw(2, 5, 16).requires_grad_(), torch.randint(40, (2, 5))
    head.operands.choose("float32")
    loss = head.loss(h, targets)
    found = [loss.detach(), *torch.autograd.grad(loss, [h, head.weight])]
    assert [one.dtype for one in found] == [torch.float32, torch.bfloat16, torch.bfloat16]
    wide = [one.detach().double().requires_grad_() for one in (h, head.weight)]
    logits = torch.nn.functional.linear(wide[0], wide[1]).flatten(0, 1)
    exact = torch.nn.functional.cross_entropy(logits, targets.flatten(), reduction="sum")
    expected = [exact.detach(), *torch.autograd.grad(exact, wide)]
    torch.testing.assert_close(found[0].double(), expected[0], rtol=1e-5, atol=0)
    for ours, right in zip(found[1:], expected[1:], strict=True):
        torch.testing.assert_close(ours.double(), right, rtol=HALF_ULP, atol=1e-5)


@pytest.mark.parametrize(
    ("has", "slow"),
    [
        pytest.param({}, True, id="nothing"),
        pytest.param(WITHOUT, True, id="Intel's AVX-512"),
        pytest.param({"avx512_bf16": True, "cpu_name": "AMD EPYC"}, False, id="AMD's AVX-512"),
        pytest.param({**WITHOUT, **WITH}, False, id="AMX"),
        pytest.param({"neon": True, "bf16": False}, True, id="ARM"),
        pytest.param({"neon": True, "bf16": True}, False, id="ARM with bfloat16"),
    ],
)
def test_processors(has: dict[str, Any], slow: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    processor(monkeypatch, has)
    assert slow_in_bfloat16(CPU) is slow and not slow_in_bfloat16(GPU)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert slow_in_bfloat16(CPU)


@pytest.mark.parametrize(
    ("name", "fast", "plain"),
    [("linear", "reference", "reference"), ("head", "reference", "reference"), ("grouped_mm", "torch", "loop")],
)
def test_auto_takes_it_where_bfloat16_is_slow(
    name: str, fast: str, plain: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def found(wanted: str, device: torch.device, dtype: torch.dtype) -> str:
        return kernels.chosen(build(ffn="moe"), {name: wanted}, device, dtype)[name].implementation

    processor(monkeypatch, WITHOUT)
    assert found("auto", CPU, torch.bfloat16) == "float32"
    assert found("reference", CPU, torch.bfloat16) == plain
    assert found("auto", CPU, torch.float32) == found("auto", GPU, torch.bfloat16) == fast
    processor(monkeypatch, WITH)
    assert found("auto", CPU, torch.bfloat16) == fast and found("float32", CPU, torch.bfloat16) == "float32"
    with pytest.raises(ValueError, match=rf"kernels.{name} is float32, and it is for numbers of bfloat16.*; use auto"):
        found("float32", CPU, torch.float64)


def test_a_choice_of_float32_takes_gates_too() -> None:
    matrix, gate = Linear(16, 16), Linear(16, 16, role="gate")
    for one in (matrix, gate):
        one.choose("float32")
    assert matrix.call is gate.call is linear_in_float32


def test_a_run_in_bfloat16_says_it_and_learns_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, losses = prepare_data(tmp_path), []
    for index, has in enumerate((WITH, WITHOUT)):
        processor(monkeypatch, has)
        config = run_config(data, tmp_path / str(index), steps=3, dtype="bfloat16")
        _, text = run(config)
        assert ("head float32, linear float32" in text) == (has is WITHOUT)
        losses.append([record["train/loss"] for record in records(config) if "train/loss" in record])
    assert len(losses[0]) == 3 and losses[1] == pytest.approx(losses[0], rel=HALF_ULP)
    assert losses[1] != losses[0]  # the head's logits are not rounded


def test_use_of_the_machine_is_measured_against_its_faster_products(monkeypatch: pytest.MonkeyPatch) -> None:
    flops = {torch.float32: 300e9, torch.bfloat16: 150e9}
    monkeypatch.setattr(peak, "matmul_peak", lambda device, dtype: flops[dtype])
    assert peak.numbers_peak("cpu", torch.bfloat16) == peak.numbers_peak("cpu", torch.float32) == 300e9
    assert peak.numbers_peak("cuda", torch.bfloat16) == 150e9
    flops[torch.bfloat16] = 1200e9
    assert peak.numbers_peak("cpu", torch.bfloat16) == 1200e9 and peak.numbers_peak("cpu", torch.float32) == 300e9
