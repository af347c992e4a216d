"""The written-out derivative of RMSNorm against torch's, value and gradients, at awkward sizes."""

import pytest
import torch
import torch.nn.functional as F

from models.kernels.rms_norm import rms_norm, rms_norm_torch

# Sums of at most 65 terms in another order; bfloat16 rounds to 2^-9 of a value, and a weight's gradient adds up 35.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 3e-2}


@pytest.mark.usefixtures("blocked")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(1,), (1, 1), (7, 3), (5, 7, 65), (2, 3, 4, 8)], ids=str)
@pytest.mark.parametrize("function", [rms_norm, rms_norm_torch])
def test_equals_torch(function, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(shape[-1], generator=generator).to(dtype).requires_grad_()
    grad = torch.randn(shape, generator=generator).to(dtype)
    y = function(x, weight, 1e-6)
    assert y.dtype == dtype
    got = (y, *torch.autograd.grad(y, (x, weight), grad))
    wide = [tensor.detach().double().requires_grad_() for tensor in (x, weight)]
    reference = F.rms_norm(wide[0], shape[-1:], wide[1], 1e-6)
    expected = (reference, *torch.autograd.grad(reference, wide, grad.double()))
    for a, b in zip(got, expected, strict=True):
        assert (a.double() - b).abs().max() <= TOLERANCE[dtype] * max(1.0, b.detach().abs().max().item())


def test_views_and_the_given_gradient_stay_as_they_are() -> None:
    """Inputs need not be contiguous, and what backward works on in place is its own."""
    x = torch.randn(4, 6, dtype=torch.float64).mT.requires_grad_()
    weight, grad = torch.ones(4, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    before = grad.clone()
    (got,) = torch.autograd.grad(rms_norm(x, weight, 1e-6), x, grad)
    (expected,) = torch.autograd.grad(F.rms_norm(x, (4,), weight, 1e-6), x, grad)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)
    assert torch.equal(grad, before)


def test_no_tokens() -> None:
    x = torch.empty(0, 4, requires_grad=True)
    y = rms_norm(x, torch.ones(4), 1e-6)
    assert torch.autograd.grad(y.sum(), x)[0].shape == x.shape
