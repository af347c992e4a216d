"""Picks of experts put together: Triton's kernels, interpreted, against plain torch, and that against a sum by hand."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from models.kernels.combine.reference import Free
from tests.kernels.interpreted import compare, draw, implementation
from tests.kernels.made import placed

# (tokens, picks, constants, width)
SIZES = [(5, 2, 2, 7), (3, 3, 0, 64), (4, 1, 1, 1025), (0, 2, 1, 8)]


@pytest.mark.parametrize("free", [True, False], ids=["free", "experts alone"])
@pytest.mark.parametrize("share", [1.0, 0.5, 0.0], ids=["all", "some", "none"])
@pytest.mark.parametrize(("tokens", "picks", "constants", "width"), SIZES)
def test_equals_the_reference(tokens: int, picks: int, constants: int, width: int, share: float, free: bool) -> None:
    places_NK, rows = placed(tokens, picks, share)

    def combined(call: Callable[..., Any], y: Tensor, weights: Tensor, *others: Tensor) -> Tensor:
        return call(y, weights, places_NK, Free(*others) if others else None)

    operands = ((rows, width), (tokens, picks), (tokens, width), (tokens, 1), (tokens, constants), (constants, width))
    compare("combine", combined, *(draw(*shape) for shape in (operands if free else operands[:2])))


@pytest.mark.parametrize("name", ["reference", "triton"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_sums_what_is_made(name: str, dtype: torch.dtype) -> None:
    """What is not made adds nothing, be it infinite where a row happens to lie."""
    y_PD = torch.tensor([[torch.inf, 1.0], [2.0, 3.0], [4.0, 5.0]], dtype=dtype)
    weights_NK = torch.tensor([[0.5, 9.0], [2.0, -1.0]], dtype=torch.promote_types(dtype, torch.float32))
    out_ND = implementation("combine", name)(y_PD, weights_NK, torch.tensor([[0, -1], [1, 2]]))
    assert out_ND.dtype == dtype and out_ND.tolist() == [[torch.inf, 0.5], [0.0, 1.0]]
