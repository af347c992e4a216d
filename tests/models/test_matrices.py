"""Structured matrices: the one dense matrix that each is, its size at the start, and guidance."""

import math

import pytest
import torch

from models.matrices.base import MatrixConfig
from models.matrices.block_dense import BlockDenseConfig
from models.matrices.block_shuffle import BlockShuffle, BlockShuffleConfig
from models.matrices.guided import Guided, GuidedConfig
from models.matrices.low_rank import LowRankConfig
from models.params import Normal, initialize

STRUCTURED = [LowRankConfig(12), BlockDenseConfig(32, 4), BlockShuffleConfig(4), BlockShuffleConfig(1)]


def dense(config: MatrixConfig, d_in: int, d_out: int, std: float = 0.02) -> torch.Tensor:
    """The matrix [outputs, inputs] that it is, at the start."""
    matrix = config.build(d_in, d_out, init=Normal(std)).double()
    initialize(matrix, 0)
    return matrix(torch.eye(d_in, dtype=torch.float64)).T.detach()


@pytest.mark.parametrize("widths", [(96, 64), (64, 96)], ids=str)
@pytest.mark.parametrize("config", STRUCTURED, ids=str)
def test_starts_as_large_as_a_dense_one(config: MatrixConfig, widths: tuple[int, int]) -> None:
    """An element is a sum of products of two Gaussians; 6144 of them, which depend on one another through 12 channels
    or more, are within a fifth of the asked-for size."""
    weight = dense(config, *widths, std=0.5)
    assert weight.square().mean().sqrt().item() == pytest.approx(0.5, rel=0.2)


def test_low_rank_has_that_rank() -> None:
    assert torch.linalg.matrix_rank(dense(LowRankConfig(5), 24, 16)) == 5


@pytest.mark.parametrize(("blocks", "d_in", "d_out"), [(4, 16, 24), (4, 24, 16), (8, 24, 16), (3, 12, 18)])
def test_shuffled_channels_by_their_formula(blocks: int, d_in: int, d_out: int) -> None:
    matrix = BlockShuffleConfig(blocks).build(d_in, d_out).double()
    assert isinstance(matrix, BlockShuffle)
    initialize(matrix, 0)
    width = min(d_in, d_out) // blocks
    expected = torch.zeros(d_out, d_in, dtype=torch.float64)
    for o in range(d_out):
        for i in range(d_in):
            block, inside = divmod(i, d_in // blocks)
            for q in range(width):
                channel = block * width + q
                if channel % blocks == o % blocks:
                    first = matrix.first[block, inside, q]
                    expected[o, i] += first * matrix.second[o % blocks, channel // blocks, o // blocks]
    found = matrix(torch.eye(d_in, dtype=torch.float64)).T
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 1, 3), (0,), (2, 0)], ids=str)
@pytest.mark.parametrize("config", STRUCTURED[:3], ids=str)
def test_any_leading_dimensions(config: MatrixConfig, shape: tuple[int, ...]) -> None:
    matrix = config.build(16, 24).double()
    initialize(matrix, 0)
    x = torch.randn(*shape, 16, dtype=torch.float64)
    expected = x.flatten(0, -2) @ dense(config, 16, 24).T
    torch.testing.assert_close(matrix(x), expected.view(*shape, 24), rtol=0, atol=1e-14)


def test_guidance_fades_and_is_gone() -> None:
    guided = GuidedConfig(LowRankConfig(3), steps=4).build(8, 6).double()
    assert isinstance(guided, Guided)
    initialize(guided, 0)
    x = torch.randn(5, 8, dtype=torch.float64)
    for step in range(7):
        ratio = (1 + math.cos(math.pi * min(step, 4) / 4)) / 2
        expected = ratio * guided.dense(x) + (1 - ratio) * guided.structured(x)
        torch.testing.assert_close(guided(x), expected, rtol=1e-15, atol=1e-15)
        guided.after_step()
    torch.testing.assert_close(guided(x), guided.structured(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("config", "d_in", "reason"),
    [
        (BlockDenseConfig(8, 4), 18, "blocks is 4, which does not divide the width of what it maps, 18"),
        (BlockShuffleConfig(5), 16, "blocks is 5, which does not divide the width of what it maps, 16"),
    ],
    ids=str,
)
def test_refuses_blocks_that_do_not_divide(config: MatrixConfig, d_in: int, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        config.build(d_in, 24)
