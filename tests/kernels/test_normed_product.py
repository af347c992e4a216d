"""A norm and the product behind it: Triton's kernels, interpreted, against plain torch."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.interpreted import compare, draw, implementation

EPS = 1e-5


@pytest.mark.parametrize(
    ("rows", "width", "columns"), [((2, 3, 4), 7, 6), ((17,), 130, 24), ((1, 1), 128, 1), ((0,), 8, 2)]
)
def test_equals_the_reference(rows: tuple[int, ...], width: int, columns: int) -> None:
    def rms(call: Callable[..., Any], x: Tensor, w: Tensor, weight: Tensor) -> Tensor:
        return call(x, w, weight, None, EPS)

    def layer(call: Callable[..., Any], x: Tensor, w: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return call(x, w, weight, bias, EPS)

    operands = (draw(*rows, width), draw(width, columns), draw(width))
    compare("normed_product", rms, *operands)
    compare("normed_product", layer, *operands, draw(1, width)[0])


def test_rows_that_are_all_but_constant() -> None:
    """Their variance rounds to less than nothing, and is not to become NaN."""
    x = torch.full((4, 300), 1000.1) + 1e-4 * draw(4, 300).detach().float()
    out = implementation("normed_product", "triton")(x, torch.ones(300, 2), torch.ones(300), torch.zeros(300), EPS)
    assert out.isfinite().all()


def test_a_row_that_is_not_in_order() -> None:
    def turned(call: Callable[..., Any], x: Tensor, w: Tensor, weight: Tensor) -> Tensor:
        return call(x.mT, w.mT, weight, None, EPS)

    compare("normed_product", turned, draw(2, 9, 5), draw(3, 9), draw(9))
