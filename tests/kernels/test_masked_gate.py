"""MoE++'s gate: Triton's kernels, interpreted, against plain torch."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.interpreted import compare, draw, implementation


# Experts that are a power of 2 and not; all picked; more tokens than a program takes; no zero expert; zero alone.
@pytest.mark.parametrize(
    ("tokens", "experts", "top_k", "first_zero"),
    [((2, 3), 8, 2, 7), ((5,), 11, 3, 10), ((4,), 3, 3, 2), ((300,), 16, 2, 16), ((7,), 5, 1, 0), ((0,), 4, 2, 3)],
)
@pytest.mark.parametrize("adds", [False, True], ids=["first", "residual"])
def test_equals_the_reference(tokens: tuple[int, ...], experts: int, top_k: int, first_zero: int, adds: bool) -> None:
    def gated(call: Callable[..., Any], *logits: Tensor) -> list[Tensor]:
        total, probs, index, weights = call(*logits, *[None] * (2 - len(logits)), top_k, first_zero)
        return [total, probs, weights, one_hot(index, experts)]

    logits = (draw(*tokens, experts), draw(1, *tokens, experts)[0])
    compare("masked_gate", gated, *logits[: 1 + adds])


def one_hot(index_K: Tensor, experts: int) -> Tensor:
    """As something that has a gradient, of 0."""
    hot = torch.nn.functional.one_hot(index_K, experts).double()
    return hot + torch.zeros_like(hot, requires_grad=True)


def test_picks_that_are_given() -> None:
    """A pass that runs again takes the picks that it made."""
    picked = torch.tensor([[4, 0], [1, 2], [3, 4]])

    def gated(call: Callable[..., Any], logits: Tensor) -> list[Tensor]:
        _, _, index, weights = call(logits, None, 2, 4, picked)
        assert torch.equal(index, picked)
        return [weights]

    compare("masked_gate", gated, draw(3, 5))


def test_equal_logits() -> None:
    """All are picked in turn, the first ones first."""
    _, _, index, weights = implementation("masked_gate", "triton")(torch.zeros(2, 4, dtype=torch.float64), None, 3, 2)
    assert torch.equal(index, torch.tensor([[0, 1, 2]] * 2))
    torch.testing.assert_close(weights, torch.tensor([[0.5, 0.5, 0.0]] * 2, dtype=torch.float64))
