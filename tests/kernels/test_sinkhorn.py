"""Sinkhorn-Knopp: Triton's kernels, interpreted, against plain torch."""

import pytest

from tests.kernels.interpreted import compare, draw


@pytest.mark.parametrize(("shape", "iterations"), [((2, 3, 4, 4), 20), ((70, 4, 4), 1), ((5, 3, 3), 7), ((0, 2, 2), 3)])
def test_equals_the_reference(shape: tuple[int, ...], iterations: int) -> None:
    compare("sinkhorn", lambda call, x: call(x, iterations), draw(*shape))


def test_logits_far_apart() -> None:
    """As mHC starts: all but the diagonal next to nothing."""
    compare("sinkhorn", lambda call, x: call(20 * x, 20), draw(6, 4, 4), tolerance=1e-11)
