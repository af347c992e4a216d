"""Blocks of rows are all rows, each once."""

import pytest
import torch

from models.kernels.blocks import ELEMENTS, row_blocks


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (1, 1), (5, ELEMENTS + 1), (1000, 777), (2**11, 2, 2**8)], ids=str)
def test_every_row_once(shape: tuple[int, ...]) -> None:
    x = torch.empty(shape, dtype=torch.int8)
    slices = list(row_blocks(x))
    assert [row for block in slices for row in range(shape[0])[block]] == list(range(shape[0]))
    assert all(x[block].numel() <= max(ELEMENTS, x[0].numel()) for block in slices)


def test_elsewhere_than_on_a_cpu_one_block() -> None:
    assert list(row_blocks(torch.empty(9, ELEMENTS, device="meta"))) == [slice(0, 9)]
