"""Blocked causal attention against torch's with an explicit mask, outputs and gradients, at awkward sizes."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from models.kernels.attention import as_bias, attend, attend_sdpa, blocked, visibility
from models.kernels.attention.blocked import attend_blocked
from tests.compilers import needs_compiler

# batch, length, query heads, key heads, key width, value width
SHAPES = {
    "one token": (2, 1, 2, 1, 4, 4),
    "one block, cut": (1, 5, 4, 2, 6, 3),
    "a block exactly": (2, 16, 2, 2, 4, 4),
    "blocks and one token": (2, 33, 6, 2, 4, 8),
    "many blocks": (1, 70, 3, 3, 8, 8),
}
# Sums of at most 70 products in another order; bfloat16 rounds scores of size about 1 to 2^-9 of themselves.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 3e-2}


@pytest.fixture(autouse=True)
def short_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocked, "BLOCK", 16)


def places(batch: int, length: int, packed: bool) -> tuple[Tensor | None, Tensor]:
    """Documents of 1, 7, 20, ... tokens, then padding; and positions that start anew in each."""
    index_BT = torch.arange(length).expand(batch, -1)
    if not packed:
        return None, index_BT
    starts = torch.tensor([0, 1, 8, 28, 50])
    document_BT = (index_BT[..., None] >= starts).sum(-1) - 1
    positions_BT = index_BT - starts[document_BT]
    return document_BT.masked_fill(index_BT >= length - 2, -1), positions_BT


@pytest.mark.parametrize("kept", [0, 2**40], ids=["recomputed", "kept"])
@pytest.mark.parametrize("window", [None, 1, 3, 20])
@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_equals_attention_with_a_mask(
    dtype: torch.dtype, shape: str, packed: bool, window: int | None, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocked, "KEPT_BYTES", kept)
    compare(attend_blocked, dtype, shape, packed, window)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_that_of_torch_equals_it_too(dtype: torch.dtype, shape: str, packed: bool, window: int | None) -> None:
    compare(attend_sdpa, dtype, shape, packed, window)


def compare(function: Callable[..., Tensor], dtype: torch.dtype, shape: str, packed: bool, window: int | None) -> None:
    """Outputs and gradients with those of attention with a mask, in float64."""
    batch, length, heads, key_heads, key, value = SHAPES[shape]
    generator = torch.Generator().manual_seed(0)
    sizes = [(heads, key), (key_heads, key), (key_heads, value)]
    inputs = [torch.randn(batch, length, *size, generator=generator).to(dtype).requires_grad_() for size in sizes]
    cotangent = torch.randn(batch, length, heads, value, generator=generator).to(dtype)
    documents_BT, positions_BT = places(batch, length, packed)

    q, k, v = inputs
    out = function(q, k, v, positions_BT, documents_BT, window)
    assert out.dtype == dtype
    got = (out, *torch.autograd.grad(out, inputs, cotangent))

    wide = [x.detach().double().requires_grad_() for x in inputs]
    ids_BT = torch.zeros_like(positions_BT) if documents_BT is None else documents_BT
    visible = visibility(
        torch.arange(length).expand(batch, -1), ids_BT, torch.arange(length).expand(batch, -1), ids_BT, window
    )
    q, k, v = wide
    reference = attend(q, k, v, as_bias(visible, torch.float64))
    expected = (reference, *torch.autograd.grad(reference, wide, cotangent.double()))
    for a, b in zip(got, expected, strict=True):
        assert (a.double() - b).abs().max() <= TOLERANCE[dtype] * max(1.0, b.detach().abs().max().item())


@needs_compiler
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize(
    "kept", [pytest.param(0, id="recomputed", marks=pytest.mark.slow), pytest.param(2**40, id="kept")]
)
def test_a_compiler_calls_it_as_it_is(kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits, compiled and not, between operations that a compiler lays out as it likes."""
    monkeypatch.setattr(blocked, "KEPT_BYTES", kept)
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(2, 33, 8 * 4, generator=generator, dtype=torch.float64).requires_grad_()
    documents_BT, positions_BT = places(2, 33, packed=True)

    def through(qkv: Tensor) -> Tensor:
        q, k, v = (qkv * 2).unflatten(-1, (8, 4)).split((4, 2, 2), dim=2)
        return attend_blocked(q, k, v, positions_BT, documents_BT, 20) + 1

    torch.compiler.reset()
    outs = [function(qkv) for function in (through, torch.compile(through, fullgraph=True))]
    expected, got = ((out, *torch.autograd.grad(out.sin().sum(), qkv)) for out in outs)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
