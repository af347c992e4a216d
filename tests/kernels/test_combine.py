"""Picks of experts put together: Triton's kernels, interpreted, against plain torch."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from models.kernels.picks import Picks
from tests.kernels.interpreted import compare, draw


@pytest.mark.parametrize("kept", ["all", "some", "none", None])
@pytest.mark.parametrize(
    ("tokens", "picks", "constants", "width"), [(5, 2, 2, 7), (3, 3, 0, 64), (4, 1, 1, 1025), (0, 2, 1, 8)]
)
def test_equals_the_reference(tokens: int, picks: int, constants: int, width: int, kept: str | None) -> None:
    generator = torch.Generator().manual_seed(0)
    share = {"all": 1.0, "some": 0.5, "none": 0.0, None: 1.0}[kept]
    keep_NK = torch.rand(tokens, picks, generator=generator) < share
    rows = int(keep_NK.sum())

    def combined(call: Callable[..., Any], y: Tensor, weights: Tensor, *others: Tensor) -> Tensor:
        return call(y, weights, Picks.of(None if kept is None else keep_NK), *others)

    operands = ((rows, width), (tokens, picks), (tokens, width), (tokens, 1), (tokens, constants), (constants, width))
    compare("combine", combined, *(draw(*shape) for shape in operands))
