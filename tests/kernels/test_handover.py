"""A write of streams and the read behind it: Triton's kernel, interpreted, against plain torch."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from models.kernels.handover.reading import Reading, Squash
from models.kernels.normed_product.reference import normed_product
from models.kernels.stream_mix.reference import stream_mix
from tests.kernels.interpreted import compare, draw
from tests.slow import in_turn

TOKENS = (3, 7)
# Unscaled weights make values and gradients of some hundreds.
CLOSE = {"tolerance": 1e-11}


def handed(
    call: Callable[..., Any], reading: Reading | None, settle: Callable[..., Any], *written: Any
) -> list[Tensor]:
    made, read, kept = call(*written, reading, settle, stream_mix)
    return [made, read, *kept.values()]


# Rows, rows of the branch's output, rows read, logits of a row, the stride: hyper, fractions of one stream and of two,
# three streams.
LAYOUTS = [(4, 1, 1, 6, 1), (4, 4, 4, 12, 2), (6, 3, 3, 12, 3), (3, 1, 1, 5, 1)]


@pytest.mark.parametrize(
    ("sizes", "squash"), in_turn(itertools.product(LAYOUTS, (7, 129)), ("tanh", "identity", "sigmoid"))
)
def test_logits_of_rows(sizes: tuple[tuple[int, int, int, int, int], int], squash: Squash) -> None:
    (rows, out, ways, count, stride), width = sizes
    bias = [draw(width)] if squash != "sigmoid" else []
    small = draw(width, count), draw(width), draw(rows, ways), draw(1)
    written = draw(*TOKENS, rows, width), draw(*TOKENS, rows, rows), draw(*TOKENS, out, width), draw(*TOKENS, out, rows)

    def call(function: Callable[..., Any], *leaves: Tensor) -> list[Tensor]:
        (columns, weight, static, scale), streams, bias = leaves[:4], leaves[4:8], leaves[8:]

        def settle(logits: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            used = logits[..., : stride * ways : stride]
            if squash == "sigmoid":
                return (static + scale * used).sigmoid(), {"logits": logits}
            return static + scale * (used.tanh() if squash == "tanh" else used), {"logits": logits}

        reading = Reading(
            normed_product, columns, weight, bias[0] if bias else None, 1e-5, static, scale, squash, stride
        )
        return handed(function, reading, settle, *streams, False)

    compare("handover", call, *small, *written, *bias, **CLOSE)


@pytest.mark.parametrize(("rows", "count", "stride"), [(4, 24, 5), (3, 12, 1), (2, 5, 1)])
@pytest.mark.parametrize("width", [7, 129])
def test_logits_of_all_rows(rows: int, count: int, stride: int, width: int) -> None:
    small = draw(rows * width, count), draw(rows * width), draw(rows, 1), draw(1)
    written = draw(*TOKENS, rows, width), draw(*TOKENS, rows, rows), draw(*TOKENS, 1, width), draw(*TOKENS, 1, rows)

    def call(function: Callable[..., Any], *leaves: Tensor) -> list[Tensor]:
        (columns, weight, static, scale), streams = leaves[:4], leaves[4:]

        def settle(logits: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            return (static + scale * logits[..., : stride * rows : stride, None]).sigmoid(), {"logits": logits}

        reading = Reading(normed_product, columns, weight, None, 1e-6, static, scale, "sigmoid", stride, flat=True)
        return handed(function, reading, settle, *streams, True)

    compare("handover", call, *small, *written, **CLOSE)


@pytest.mark.parametrize("width", [7, 1025])
def test_weights_of_all_tokens(width: int) -> None:
    def call(function: Callable[..., Any], weights: Tensor, *written: Tensor) -> list[Tensor]:
        return handed(function, None, lambda _: (weights, {"m": written[1] * 1}), *written, False)

    compare("handover", call, draw(4, 1), draw(*TOKENS, 4, width), draw(4, 4), draw(*TOKENS, 1, width), draw(1, 4))


def test_no_tokens() -> None:
    def call(function: Callable[..., Any], columns: Tensor, *written: Tensor) -> list[Tensor]:
        static, scale = torch.zeros(4, 1).double(), torch.ones(1).double()
        reading = Reading(normed_product, columns, columns[:, 0], None, 1e-6, static, scale, "tanh", 1)
        return handed(function, reading, lambda logits: (logits[..., :1].tanh(), {}), *written, False)

    compare("handover", call, draw(8, 6), draw(0, 4, 8), draw(0, 4, 4), draw(0, 1, 8), draw(0, 1, 4))
