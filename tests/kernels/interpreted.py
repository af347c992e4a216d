"""Triton's kernels without a GPU: in its interpreter, into memory that holds NaN until a kernel has written it."""

import contextlib
import importlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

assert os.environ["TRITON_INTERPRET"] == "1", "tests/conftest.py sets it before anything imports Triton"
pytest.importorskip("triton", reason="Triton is an optional dependency (the extra `triton`)")


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """What is allocated and not written is NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def implementation(op: str, name: str) -> Callable[..., Any]:
    """Of an operation of models/kernels: `reference` or `triton`."""
    return getattr(importlib.import_module(f"models.kernels.{op}.{name}"), op)


def draw(*shape: int) -> Tensor:
    """Normal float64, of the shape's own seed, to be differentiated by."""
    generator = torch.Generator().manual_seed(hash(shape) % 2**32)
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()


def outputs(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [x for x in result if x is not None]


def results(call: Callable[..., Any], leaves: tuple[Tensor, ...]) -> list[Tensor]:
    """Outputs, and the gradients of the leaves for gradients of the outputs that are all different."""
    outs = outputs(call(*leaves))
    generator = torch.Generator().manual_seed(0)
    grads = [torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype) for out in outs]
    return [*outs, *torch.autograd.grad(outs, [leaf for leaf in leaves if leaf.requires_grad], grads)]


def compare(op: str, call: Callable[..., Any], *leaves: Tensor, tolerance: float = 1e-12) -> None:
    """call: (implementation, *leaves) -> outputs. All outputs and all gradients are the reference's.

    tolerance: 1e-12 is float64's rounding over sums of some thousands.
    """
    expected = results(lambda *x: call(implementation(op, "reference"), *x), leaves)
    with poisoned():
        found = results(lambda *x: call(implementation(op, "triton"), *x), leaves)
    for ours, reference in zip(found, expected, strict=True):
        assert ours.dtype == reference.dtype
        torch.testing.assert_close(ours, reference, rtol=tolerance, atol=tolerance)
