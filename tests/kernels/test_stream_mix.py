"""Mixes of streams: Triton's kernels, interpreted, against plain torch."""

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

from tests.kernels.interpreted import compare, draw


# Rows read and made, rows of a branch's output: what hyper reads and writes, three streams, fractions, one stream.
@pytest.mark.parametrize(("read", "made", "out"), [(4, 1, 0), (4, 4, 1), (3, 3, 1), (8, 4, 0), (8, 8, 4), (1, 1, 1)])
@pytest.mark.parametrize("by_token", [True, False], ids=["dynamic", "static"])
@pytest.mark.parametrize("width", [7, 64, 1025])
def test_equals_the_reference(read: int, made: int, out: int, by_token: bool, width: int) -> None:
    tokens = (2, 3)
    weights = [draw(*(tokens if by_token else ()), rows, made) for rows in (read, out) if rows]
    groups = [draw(*tokens, rows, width) for rows in (read, out) if rows]

    def mixed(call: Callable[..., Any], *leaves: Tensor) -> Tensor:
        m, *b = leaves[: len(weights)]
        streams, *branch = leaves[len(weights) :]
        return call(streams, m, *branch, *b)

    compare("stream_mix", mixed, *weights, *groups)


def test_moves_keep_the_rest() -> None:
    def moved(call: Callable[..., Any], m: Tensor, b: Tensor, streams: Tensor, out: Tensor) -> Tensor:
        return call(streams, m, out, b, True)

    compare("stream_mix", moved, draw(2, 3, 4, 4), draw(2, 3, 1, 4), draw(2, 3, 4, 9), draw(2, 3, 1, 9))


def test_no_tokens() -> None:
    compare("stream_mix", lambda call, m, x: call(x, m), draw(0, 4, 1), draw(0, 4, 8))
