"""Random draws: what they depend on, and that they are uniform, normal and independent."""

import math

import pytest
import torch

from models.noise import normal, of_layer, uniform, uniform_sequences
from models.state import Side

ROWS, LENGTH, WIDTH = 64, 256, 8


def side(rows: int = ROWS, length: int = LENGTH, first_key: int = 0) -> Side:
    tokens = torch.zeros(rows, length, dtype=torch.int64)
    return Side(tokens, tokens, keys=torch.arange(first_key, first_key + rows))


def test_the_draws_of_a_part_are_part_of_the_draws() -> None:
    whole = uniform(side(), "role", WIDTH)
    part = uniform(side(4, LENGTH, 7).narrow(64, 128).narrow(3, 20), "role", WIDTH)
    assert torch.equal(part, whole[7:11, 67:87])
    assert torch.equal(uniform(side(length=300), "role", 3)[:, :LENGTH], whole[..., :3])


def test_no_two_uses_draw_alike() -> None:
    """Rows, layers, roles, tokens and channels: correlations of n pairs are within 5 / sqrt(n) of 0."""
    first = uniform(side(), "role", WIDTH)
    others = [
        uniform(side(), "other", WIDTH),
        uniform(of_layer(side(), 0), "role", WIDTH),
        uniform(of_layer(side(), 1), "role", WIDTH),
        *(first.roll(1, dim) for dim in range(3)),
        uniform_sequences(side(), "role")[:, None, None].expand_as(first),
    ]
    for other in others[:-1]:
        pair = torch.stack([first.flatten(), other.flatten()])
        assert abs(float(torch.corrcoef(pair)[0, 1])) < 5 / math.sqrt(first.numel())
    assert abs(float(torch.corrcoef(torch.stack([first[:, 0, 0], others[-1][:, 0, 0]]))[0, 1])) < 5 / math.sqrt(ROWS)


def test_moments() -> None:
    """Each moment within 5 standard errors."""
    n = ROWS * LENGTH * WIDTH
    u, z = uniform(side(), "role", WIDTH).double(), normal(side(), "role", WIDTH).double()
    assert 0 < float(u.min()) < 5 / n and 1 - 5 / n < float(u.max()) < 1
    for k in (1, 2, 3, 4):
        mean, square = 1 / (k + 1), 1 / (2 * k + 1)
        assert abs(float((u**k).mean()) - mean) < 5 * math.sqrt((square - mean**2) / n)
    for k, mean, square in ((1, 0, 1), (2, 1, 3), (3, 0, 15), (4, 3, 105)):
        assert abs(float((z**k).mean()) - mean) < 5 * math.sqrt((square - mean**2) / n)
    buckets = torch.bincount((u.flatten() * 256).long(), minlength=256).double()
    # Chi-squared with 255 degrees of freedom: mean 255, variance 510.
    assert abs(float(((buckets - n / 256) ** 2 / (n / 256)).sum()) - 255) < 5 * math.sqrt(510)


def test_without_keys_nothing_is_drawn() -> None:
    tokens = torch.zeros(1, 4, dtype=torch.int64)
    assert not Side(tokens, tokens).draws
    assert of_layer(Side(tokens, tokens), 3).keys is None
    with pytest.raises(AssertionError, match="nothing is drawn in evaluation"):
        uniform(Side(tokens, tokens), "role", 2)
