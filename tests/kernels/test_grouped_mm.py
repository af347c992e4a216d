"""The grouped matrix product against a per-row oracle, outputs and gradients, at awkward sizes."""

import itertools

import pytest
import torch
from torch import Tensor

from models.kernels.grouped_mm import grouped_mm, grouped_mm_loop, grouped_mm_torch
from tests.compilers import needs_compiler

CASES = {
    "plain": ([3, 2, 4], 16, 24),
    "empty groups": ([0, 5, 0, 0, 3, 0], 16, 8),
    "one row": ([0, 1, 0], 8, 8),
    "no rows": ([0, 0], 8, 16),
    "one group": ([5], 8, 8),
    "unaligned widths": ([3, 0, 4], 7, 5),
    "unaligned inner width": ([3, 4], 6, 8),
}
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 2e-2}


def by_row(a_MK: Tensor, b_EKN: Tensor, counts_E: Tensor) -> Tensor:
    group_M = torch.arange(len(counts_E)).repeat_interleave(counts_E)
    return torch.einsum("mk,mkn->mn", a_MK, b_EKN[group_M])


@pytest.mark.parametrize(
    ("function", "dtype"),
    [
        *itertools.product((grouped_mm, grouped_mm_loop), TOLERANCE),
        *itertools.product((grouped_mm_torch,), (torch.float32, torch.bfloat16)),  # it is refused in float64
    ],
)
@pytest.mark.parametrize("case", CASES)
def test_equals_a_product_per_row(function, dtype: torch.dtype, case: str) -> None:
    counts, inner, outer = CASES[case]
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(sum(counts), inner, generator=generator).to(dtype).requires_grad_()
    b = torch.randn(len(counts), inner, outer, generator=generator).to(dtype).requires_grad_()
    cotangent = torch.randn(sum(counts), outer, generator=generator).to(dtype)
    out = function(a, b, torch.tensor(counts))
    assert out.dtype == dtype
    got = (out, *torch.autograd.grad(out, (a, b), cotangent))
    wide = [x.detach().double().requires_grad_() for x in (a, b)]
    reference = by_row(wide[0], wide[1], torch.tensor(counts))
    expected = (reference, *torch.autograd.grad(reference, wide, cotangent.double()))
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * 4)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_takes_the_expanded_gradient_of_a_sum(dtype: torch.dtype) -> None:
    a, b = torch.ones(3, 8, dtype=dtype, requires_grad=True), torch.ones(2, 8, 8, dtype=dtype, requires_grad=True)
    grouped_mm(a, b, torch.tensor([1, 2])).sum().backward()
    assert a.grad is not None and b.grad is not None
    assert (a.grad == 8).all() and (b.grad[0] == 1).all() and (b.grad[1] == 2).all()


def test_takes_the_gradient_of_a_sum_over_no_rows() -> None:
    a, b = torch.ones(0, 8, requires_grad=True), torch.ones(2, 8, 8, requires_grad=True)
    grouped_mm_torch(a, b, torch.tensor([0, 0])).sum().backward()
    assert a.grad is not None and b.grad is not None and a.grad.shape == a.shape and not b.grad.any()


def test_takes_rows_that_are_not_contiguous() -> None:
    a, b = torch.randn(8, 6).T, torch.randn(2, 8, 8)
    torch.testing.assert_close(grouped_mm(a, b, torch.tensor([4, 2])), by_row(a, b, torch.tensor([4, 2])))


@pytest.mark.parametrize("width", [7, 8])
def test_shapes_are_known_on_meta(width: int) -> None:
    """Where counts have no numbers; memories that measure layers go by it."""
    a_MK = torch.empty(5, width, device="meta", dtype=torch.bfloat16, requires_grad=True)
    b_EKN = torch.empty(3, width, 16, device="meta", dtype=torch.bfloat16, requires_grad=True)
    out_MN = grouped_mm(a_MK, b_EKN, torch.empty(3, dtype=torch.int64, device="meta"))
    assert out_MN.shape == (5, 16)
    out_MN.sum().backward()
    assert a_MK.grad is not None and b_EKN.grad is not None and b_EKN.grad.shape == b_EKN.shape


@needs_compiler
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch's own, where code goes on
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_is_compiled_for_every_type_that_it_takes(dtype: torch.dtype) -> None:
    """torch's own compiler takes bfloat16 alone."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(7, 16, generator=generator).to(dtype).requires_grad_()
    b = torch.randn(3, 16, 8, generator=generator).to(dtype).requires_grad_()
    for function in (grouped_mm_torch, grouped_mm_loop):
        compiled = torch.compile(function)
        # More counts than a compiler would make code for.
        for first in range(8):
            counts = torch.tensor([first, 0, 7 - first])
            outs = [call(a, b, counts) for call in (function, compiled)]
            expected, found = ([out, *torch.autograd.grad(out.square().sum(), (a, b))] for out in outs)
            for x, y in zip(found, expected, strict=True):
                torch.testing.assert_close(x, y, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
