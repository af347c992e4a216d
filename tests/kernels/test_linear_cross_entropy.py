"""The chunked cross-entropy against torch's on whole logits, value and gradients, at awkward sizes."""

import pytest
import torch
import torch.nn.functional as F

from models.kernels import linear_cross_entropy as kernel
from models.kernels.linear_cross_entropy import linear_cross_entropy

# Sums of at most 60 terms in another order; bfloat16 rounds logits of size about 3 to 2^-9 of themselves.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 3e-2}


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "CHUNK_LOGITS", 64)
    monkeypatch.setattr(kernel, "LEAST_TOKENS", 4)


@pytest.mark.usefixtures("blocked")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("tokens", "width", "vocabulary"), [(1, 3, 5), (4, 8, 16), (9, 6, 7), (60, 5, 33)])
@pytest.mark.parametrize("ignored", [0, 1, 3])
def test_equals_whole_logits(tokens: int, width: int, vocabulary: int, ignored: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(tokens, width, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, width, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    targets[:ignored] = -100
    loss = linear_cross_entropy(h, weight, targets)
    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    got = (loss, *torch.autograd.grad(loss * 0.5, (h, weight)))
    wide = [x.detach().double().requires_grad_() for x in (h, weight)]
    reference = F.cross_entropy(F.linear(*wide), targets, ignore_index=-100, reduction="sum")
    expected = (reference, *torch.autograd.grad(reference * 0.5, wide))
    for a, b in zip(got, expected, strict=True):
        assert (a.double() - b).abs().max() <= TOLERANCE[dtype] * max(1.0, b.detach().abs().max().item())


def test_far_targets_have_finite_losses() -> None:
    """A logit 200 below the largest has probability 0 in float32, and a loss of 200."""
    h, weight = torch.ones(1, 1), torch.tensor([[0.0], [200.0]])
    assert linear_cross_entropy(h, weight, torch.tensor([0])).item() == 200.0


def test_only_counted_tokens_are_in_the_value() -> None:
    h = torch.randn(3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    weight, targets = torch.eye(2, dtype=torch.float64), torch.tensor([0, 1, 0])
    part = linear_cross_entropy(h, weight, targets, counted_N=torch.tensor([True, False, False]))
    torch.testing.assert_close(part, linear_cross_entropy(h[:1], weight, targets[:1]), rtol=1e-14, atol=0)
    (gradient,) = torch.autograd.grad(part, h)
    (whole,) = torch.autograd.grad(linear_cross_entropy(h, weight, targets), h)
    assert torch.equal(gradient, whole)
