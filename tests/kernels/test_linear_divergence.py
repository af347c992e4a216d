"""The chunked divergence against torch's on whole logits, value and gradients, at awkward sizes."""

import pytest
import torch
import torch.nn.functional as F

from models.kernels import linear_divergence as kernel
from models.kernels.linear_divergence import linear_divergence

# Sums of at most 60 terms in another order; bfloat16 rounds logits of size about 3 to 2^-9 of themselves.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 3e-2}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("tokens", "width", "vocabulary"), [(1, 3, 5), (9, 6, 7), (60, 5, 33)])
@pytest.mark.parametrize("ignored", [0, 1])
def test_equals_whole_logits(
    tokens: int, width: int, vocabulary: int, ignored: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel, "CHUNK_LOGITS", 64)
    monkeypatch.setattr(kernel, "LEAST_TOKENS", 4)
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(tokens, width, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, width, generator=generator).to(dtype).requires_grad_()
    teacher = torch.randn(tokens, vocabulary, generator=generator).to(dtype)
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    targets[:ignored] = -100
    loss = linear_divergence(h, weight, targets, teacher)
    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    got = (loss, *torch.autograd.grad(loss * 0.5, (h, weight)))
    wide = [x.detach().double().requires_grad_() for x in (h, weight)]
    log_q, log_p = F.linear(*wide).log_softmax(-1), teacher.double().log_softmax(-1)
    reference = F.kl_div(log_q[ignored:], log_p[ignored:], log_target=True, reduction="sum")
    expected = (reference, *torch.autograd.grad(reference * 0.5, wide))
    for a, b in zip(got, expected, strict=True):
        assert (a.double() - b).abs().max() <= TOLERANCE[dtype] * max(1.0, b.detach().abs().max().item())


def test_a_student_that_agrees_has_nothing_to_learn() -> None:
    generator = torch.Generator().manual_seed(0)
    h, weight = torch.randn(5, 4, generator=generator).requires_grad_(), torch.randn(7, 4, generator=generator)
    loss = linear_divergence(h, weight, torch.zeros(5, dtype=torch.int64), F.linear(h.detach(), weight))
    assert loss.item() == 0 and not torch.autograd.grad(loss, h)[0].any()
