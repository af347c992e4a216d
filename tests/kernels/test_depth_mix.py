"""Weighted sums over depth: Triton's kernels, interpreted, against plain torch."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.interpreted import compare, draw, implementation


def mixed(call: Callable[..., Any], weights: Tensor, *sources: Tensor) -> list[Tensor]:
    return call(list(sources), weights)


# Widths about a power of 2 and about what one program takes; one way and one that has to be padded; one source.
@pytest.mark.parametrize(("ways", "count", "width"), [(4, 3, 7), (1, 1, 64), (3, 2, 33), (4, 5, 1025), (1, 6, 4097)])
@pytest.mark.parametrize("by_token", [True, False], ids=["dynamic", "static"])
def test_equals_the_reference(ways: int, count: int, width: int, by_token: bool) -> None:
    weights = draw(*((2, 3) if by_token else ()), ways, count)
    compare("depth_mix", mixed, weights, *(draw(2, 3, width) for _ in range(count)))


def test_no_tokens() -> None:
    compare("depth_mix", mixed, draw(2, 0, 4, 2), draw(2, 0, 8), draw(2, 0, 8))


def test_strides_and_addresses_of_any_kind() -> None:
    """A stretch of a longer row begins where a load of 16 bytes may not."""

    def strided(call: Callable[..., Any], weights: Tensor, x: Tensor, y: Tensor) -> list[Tensor]:
        return call([x[:, 1:], y.t()], weights.transpose(1, 2))

    compare("depth_mix", strided, draw(3, 2, 4), draw(3, 9), draw(8, 3))


def test_a_gradient_that_nobody_asks_for() -> None:
    def first(call: Callable[..., Any], weights: Tensor, *sources: Tensor) -> Tensor:
        return call(list(sources), weights)[0]

    compare("depth_mix", first, draw(3, 2, 2), draw(3, 8), draw(3, 8).detach())


def test_sums_of_bfloat16_are_float32() -> None:
    """Sources of bfloat16 with weights of float32, as in training, and one rounding at the end."""
    sources, weights = [draw(5, 40).bfloat16() for _ in range(3)], draw(5, 2, 3).float()
    for ours, exact in zip(
        implementation("depth_mix", "triton")(sources, weights),
        implementation("depth_mix", "reference")([x.double() for x in sources], weights.double()),
        strict=True,
    ):
        assert ours.dtype == torch.bfloat16
        # A whole unit in the last place, since the interpreter cuts off what a GPU rounds, and float32's sums.
        torch.testing.assert_close(ours.double(), exact, rtol=2**-7, atol=2**-18)
