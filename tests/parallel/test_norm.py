"""The norm of gradients: as exact as in float64, whatever their shape."""

import pytest
import torch

from parallel.gradients import LONGEST_ROW, square


@pytest.mark.parametrize(
    "shape",
    [(), (0,), (7,), (2**22,), (3, 0), (0, 3), (5, LONGEST_ROW), (5, LONGEST_ROW + 1), (2, 2**20), (4, 3, 129)],
    ids=str,
)
def test_it_is_that_of_float64(shape: tuple[int, ...]) -> None:
    """To what float32 rounds a sum of 2^14 squares; flat buffers are what ZeRO keeps."""
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    exact = gradient.double().square().sum()
    torch.testing.assert_close(square(gradient), exact, rtol=1e-6, atol=0)
    torch.testing.assert_close(square(gradient.double()), exact, rtol=(gradient.numel() + 2) * 2.0**-53, atol=0)


def test_what_is_not_finite_stays_so() -> None:
    for bad in (torch.nan, torch.inf):
        gradient = torch.ones(4, 8)
        gradient[2, 3] = bad
        assert not square(gradient).isfinite()
