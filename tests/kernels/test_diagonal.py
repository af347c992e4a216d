"""The recurrence of vectors against a loop: values, last states and gradients, at awkward lengths."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from models.kernels.diagonal import scan, scan_pairs

Rule = Callable[[Tensor, Tensor, Tensor | None, Tensor], tuple[Tensor, Tensor]]


def loop(a: Tensor, x: Tensor, documents: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
    rows = []
    for b in range(x.shape[0]):
        h, outs = state[b], []
        for t in range(x.shape[1]):
            ids = [0] * x.shape[1] if documents is None else documents[b].tolist()
            if ids[t] >= 0:
                h = (h * 0 if t and ids[t] != ids[t - 1] else a[b, t] * h) + x[b, t]
            outs.append(h)
        rows.append(torch.stack(outs))
    return torch.stack(rows), torch.stack([row[-1] for row in rows])


def complex_loop(a: Tensor, x: Tensor, documents: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
    a, x, state = (torch.view_as_complex(y) for y in (a, x, state))
    h, last = loop(a, x, documents, state)
    return torch.view_as_real(h), torch.view_as_real(last)


@pytest.mark.parametrize("rules", [(scan, loop), (scan_pairs, complex_loop)], ids=["real", "complex"])
@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 130])
def test_equals_a_loop(length: int, packed: bool, rules: tuple[Rule, Rule]) -> None:
    generator = torch.Generator().manual_seed(length)
    shape = (2, length, 3, 2)
    a = torch.rand(shape, generator=generator, dtype=torch.float64).pow(0.1)
    if scan_pairs in rules:
        radius, angle = a.unbind(-1)
        a = torch.stack([radius * angle.mul(9).cos(), radius * angle.mul(9).sin()], -1)
    x, grad = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    state, last_grad = (torch.randn(2, 3, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    leaves = (a.requires_grad_(), x.requires_grad_(), state.requires_grad_())
    documents = None
    if packed:
        documents = torch.stack([torch.arange(length) // 5, torch.arange(length) * 2 // length])
        documents[1, max(length - 4, 1) :] = -1
    results = []
    for rule in rules:
        h, last = rule(a, x, documents, state)
        results.append((h, last, *torch.autograd.grad((h * grad).sum() + (last * last_grad).sum(), leaves)))
    for ours, reference in zip(*results, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_sequences_stay_finite_and_right(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.rand(1, 8192, 4, generator=generator).pow(8).to(dtype)
    a[:, ::5] = 1
    x = torch.randn(1, 8192, 4, generator=generator).to(dtype)
    h, last = scan(a, x)
    assert h.dtype == dtype and last.dtype == torch.float32
    expected = scan(a.double(), x.double())[1]
    torch.testing.assert_close(last.double(), expected, rtol=1e-5, atol=1e-5)
