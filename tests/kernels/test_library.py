"""How a run chooses among implementations of torch's, of other libraries and of ours."""

from typing import Any

import pytest
import torch
from torch import Tensor

from models.kernels.linear import fused
from models.kernels.of_libraries import Library
from models.kernels.op import ops_of
from models.lm import LM
from models.params import initialize
from parallel.mesh import MeshConfig
from tests.contract.tiny import build, plain
from trainer import kernels

CPU, GPU = torch.device("cpu"), torch.device("cuda")
DELTA = {"kind": "gated_deltanet", "num_heads": 2, "head_dim": 8}
EXPERTS = {**plain("ffn", "moe"), "hidden": 8}


def line(device: torch.device, dtype: torch.dtype, wanted: Any = "auto", mesh: str = "", **model: Any) -> str:
    """What it says of others than norms and matrices, which all models have, and than kernels of ours."""
    chosen = kernels.chosen(build(**model), wanted, device, dtype, MeshConfig.parse(mesh) if mesh else None)
    left_out = "head", "linear", "rms_norm", "combine", "permute", "queues"
    found = kernels.line({name: one for name, one in chosen.items() if name not in left_out})
    return (found or "kernels: ").removeprefix("kernels: ")


MISSING = "chunked (fla: flash-linear-attention is not installed)"
WIDE = "chunked (fla: its kernels are called in bfloat16, where this is float32)"
SLOTS = "slot_recurrence chunked"


@pytest.mark.parametrize(
    ("mixer", "with_it", "without"),
    [
        (DELTA, "recurrence fla", f"recurrence {MISSING}"),
        ("gla", "recurrence fla", f"recurrence {MISSING}"),
        ("gsa", f"recurrence fla, {SLOTS}", f"recurrence {MISSING}, {SLOTS}"),
        ("based", f"recurrence {WIDE}", f"recurrence {MISSING}"),
        ({"kind": "linear_attention", "num_heads": 4}, f"recurrence {WIDE}", f"recurrence {MISSING}"),
        ({"kind": "linear_attention", "num_heads": 4, "normalize": False}, "recurrence fla", f"recurrence {MISSING}"),
        (
            {**DELTA, "head_dim": 512, "num_heads": 1},
            "recurrence chunked (fla: its delta rule takes keys of up to 256 channels, where these have 512)",
            "recurrence chunked (fla: its delta rule takes keys of up to 256 channels, where these have 512)",
        ),
        ("hgrn", "", ""),
        ("rg_lru", "", ""),
        ("lru", "", ""),
        ("clipped_softmax", "", ""),
        ("persistent_memory", "", ""),
        ("mla", "attention sdpa", "attention sdpa"),
    ],
    ids=str,
)
def test_a_line_names_what_a_gpu_calls_and_passes_over(
    mixer: Any, with_it: str, without: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for there, expected in ((True, with_it), (False, without)):
        monkeypatch.setattr(fused, "installed", lambda there=there: there)
        assert line(GPU, torch.bfloat16, mixer=mixer) == expected


@pytest.mark.parametrize(
    ("mixer", "expected"),
    [("attention", "attention blocks"), (DELTA, "recurrence chunked"), ("gsa", f"recurrence chunked, {SLOTS}")],
    ids=str,
)
def test_a_cpu_passes_nothing_over(mixer: Any, expected: str) -> None:
    assert line(CPU, torch.bfloat16, mixer=mixer) == expected


def test_grouped_products_go_by_type_and_width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_tile": True})
    odd = {**EXPERTS, "hidden": 6}
    why = "loop (torch: its rows are multiples of 16 bytes, where these have 12)"
    assert line(CPU, torch.bfloat16, ffn=EXPERTS) == "attention blocks, grouped_mm torch"
    assert line(CPU, torch.bfloat16, ffn=odd) == f"attention blocks, grouped_mm {why}"
    why = "loop (torch: its products are of types below float64)"
    assert line(CPU, torch.float64, ffn=EXPERTS) == f"attention blocks, grouped_mm {why}"


def test_what_one_layer_cannot_call_none_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "installed", lambda: True)
    wide = {**DELTA, "head_dim": 512, "num_heads": 1}
    ffn = {"kind": "swiglu", "hidden": 8}
    layers = {"A": {"mixer": DELTA, "ffn": ffn}, "B": {"mixer": wide, "ffn": ffn}}
    assert line(GPU, torch.bfloat16, layers=layers, pattern="AB", num_layers=1).startswith(
        "recurrence chunked (fla: its delta rule"
    )


@pytest.mark.parametrize(
    ("wanted", "model", "sentence"),
    [
        (
            {"recurrence": "fla"},
            {"mixer": DELTA},
            "kernels.recurrence is fla, and its kernels need a GPU, where this is cpu; use auto or reference",
        ),
        (
            {"recurrence": "triton"},
            {"mixer": DELTA},
            "kernels.recurrence is 'triton'; use one of auto, fla, chunked, recurrent, reference",
        ),
        (
            {"recurrence": "chunked"},
            {"mixer": "hgrn"},
            "kernels.recurrence is given, and the model has no operation of this name; it has head, linear, rms_norm",
        ),
        (
            {"grouped_mm": "torch"},
            {"ffn": {**EXPERTS, "hidden": 6}},
            "kernels.grouped_mm is torch, and its rows are multiples of 16 bytes, where these have 12; use auto",
        ),
    ],
)
def test_what_cannot_be_called_is_refused(wanted: dict[str, str], model: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        kernels.chosen(build(**model), wanted, CPU, torch.bfloat16)


def test_a_ring_has_an_attention_of_its_own() -> None:
    ring, ulysses = "cp=2,context=ring", "cp=2"
    assert line(CPU, torch.float32, mesh=ring) == "attention ring"
    assert line(CPU, torch.float32, "reference", mesh=ring) == "attention ring"
    assert line(CPU, torch.float32, mesh=ulysses) == "attention blocks"
    assert line(CPU, torch.float32, mesh=ring, mixer=DELTA) == "recurrence chunked"
    sentence = "kernels.attention is blocks, and with mesh.context ring .*; use auto, or mesh.context ulysses"
    for refuse in (
        lambda: line(CPU, torch.float32, {"attention": "blocks"}, ring),
        lambda: line(CPU, torch.float32, "blocks", ring),
        lambda: kernels.refuse(build(), {"attention": "blocks"}, MeshConfig.parse(ring)),
    ):
        with pytest.raises(ValueError, match=sentence):
            refuse()


MODELS = {
    "attention": ({"mixer": "attention"}, {"attention": ("blocks", "sdpa")}),
    "mla": ({"mixer": "mla"}, {"attention": ("blocks", "sdpa")}),
    "moe": ({"ffn": EXPERTS}, {"grouped_mm": ("torch", "loop"), "rms_norm": ("rows", "torch")}),
    "gated_deltanet": ({"mixer": DELTA}, {"recurrence": ("chunked", "recurrent")}),
    "gsa": ({"mixer": "gsa"}, {"recurrence": ("chunked", "recurrent"), "slot_recurrence": ("chunked", "recurrent")}),
}


@pytest.mark.parametrize("kind", MODELS)
def test_what_is_chosen_is_called_and_gives_the_same(kind: str) -> None:
    """Loss and every gradient, beside those of a model as built, in packed documents; float32 for the products that
    take no float64."""
    others, names = MODELS[kind]
    dtype, close = (torch.float32, 1e-5) if kind == "moe" else (torch.float64, 1e-11)
    config = build(num_layers=2, **others)
    model = LM(config).to(dtype)
    initialize(model, 0)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(config.vocab_size, (2, 21), generator=generator)
    documents = (torch.arange(20) >= 9).long().expand(2, -1)

    def gradients() -> list[Tensor]:
        out = model(tokens[:, :-1], tokens[:, 1:], documents_BT=documents)
        loss = out.loss + sum(out.losses.values())
        return [loss, *torch.autograd.grad(loss, list(model.parameters()))]

    expected = gradients()
    for name, implementations in names.items():
        ops = ops_of(model)[name]
        assert ops and all(op.call is type(op).automatic for op in ops)  # type: ignore[attr-defined]
        for implementation in implementations:
            calls = 0
            for op in ops:
                op.choose(implementation)
                function = op.call

                def counted(*args: Any, function: Any = function, **options: Any) -> Any:
                    nonlocal calls
                    calls += 1
                    return function(*args, **options)

                op.call = counted
            for ours, reference in zip(gradients(), expected, strict=True):
                torch.testing.assert_close(ours, reference, rtol=close, atol=close)
            assert calls >= len(ops)


def test_reference_is_one_of_them() -> None:
    for op in {op.name: op for ops in ops_of(LM(build(mixer="gsa", ffn=EXPERTS))).values() for op in ops}.values():
        if isinstance(op, Library):
            assert op.choice("reference", CPU, torch.float32, "kernels").implementation in op.known[1:-1]
            op.choose("reference")
            assert op.call is type(op).reference


def test_operations_have_nothing_to_save() -> None:
    model = LM(build(mixer="gsa", ffn=EXPERTS))
    assert not any(word in name for name in model.state_dict() for word in ("recurrence", "softmax", "grouped_mm"))
