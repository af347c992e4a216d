"""Tokens' rows in the order of their experts: Triton's kernels, interpreted, against plain torch, and that by hand."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from models.kernels.picks import of_picks
from tests.kernels.interpreted import compare, draw, implementation
from tests.kernels.made import placed

# (tokens, picks, width)
SIZES = [(5, 2, 7), (3, 3, 64), (4, 1, 1025), (2, 5, 1), (0, 2, 8)]


@pytest.mark.parametrize("share", [1.0, 0.5, 0.0], ids=["all", "some", "none"])
@pytest.mark.parametrize(("tokens", "picks", "width"), SIZES)
def test_equals_the_reference(tokens: int, picks: int, width: int, share: float) -> None:
    places_NK, rows = placed(tokens, picks, share)

    def permuted(call: Callable[..., Any], x: Tensor) -> Tensor:
        return call(x, places_NK, rows)

    compare("permute", permuted, draw(tokens, width))


def test_strides() -> None:
    places_NK, rows = placed(6, 2, 0.7)
    compare("permute", lambda call, x: call(x.mT[1:7], places_NK, rows), draw(5, 9))


@pytest.mark.parametrize("name", ["reference", "triton"])
@pytest.mark.parametrize("share", [1.0, 0.5], ids=["all", "some"])
def test_puts_each_row_where_its_picks_are(name: str, share: float) -> None:
    places_NK, rows = placed(7, 3, share)
    x_ND = draw(7, 4)
    out_PD, grad_PD = implementation("permute", name)(x_ND, places_NK, rows), draw(rows, 4)
    (found_ND,) = torch.autograd.grad(out_PD, x_ND, grad_PD)
    expected_ND, seen = torch.zeros_like(found_ND), set()
    for token, places in enumerate(places_NK.tolist()):
        for place in places:
            if place >= 0:
                seen.add(place)
                assert torch.equal(out_PD[place], x_ND[token])
                expected_ND[token] += grad_PD[place]
    assert seen == set(range(rows))
    torch.testing.assert_close(found_ND, expected_ND)


@pytest.mark.parametrize("name", ["reference", "triton"])
def test_sums_of_bfloat16_are_rounded_once(name: str) -> None:
    """1 and five quarters of its last digit: rounded after each addition they are nothing."""
    x_ND = torch.zeros(1, 3, dtype=torch.bfloat16, requires_grad=True)
    out_PD = implementation("permute", name)(x_ND, torch.arange(6)[None], 6)
    grad_PD = torch.tensor([1.0, *[2.0**-9] * 5], dtype=torch.bfloat16)[:, None].expand(6, 3)
    (found_ND,) = torch.autograd.grad(out_PD, x_ND, grad_PD)
    assert found_ND.tolist() == [[1 + 2.0**-7] * 3]


@pytest.mark.parametrize("share", [1.0, 0.5, 0.0], ids=["all", "some", "none"])
def test_rows_of_picks(share: float) -> None:
    """Against torch's own gradients."""
    places_NK, rows = placed(5, 3, share)
    y_PD, grad_NKD = draw(rows, 4), draw(5, 3, 4)
    zero_and_y = torch.cat([torch.zeros(1, 4, dtype=torch.float64), y_PD])
    ours, reference = of_picks(y_PD, places_NK), zero_and_y[places_NK + 1]
    assert torch.equal(ours, reference)
    found, expected = (torch.autograd.grad(out, y_PD, grad_NKD)[0] for out in (ours, reference))
    assert torch.equal(found, expected)
