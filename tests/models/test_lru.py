"""The LRU's initialisation and refusals; its equations are the golden file."""

import pytest
import torch

from models.mixers.lru import LRUConfig, Ring


@pytest.mark.parametrize(("low", "high"), [(0.9, 0.999), (0.0, 0.5)])
def test_eigenvalues_start_on_a_ring(low: float, high: float) -> None:
    """Uniform in area: a quarter of them lies within the circle that holds a quarter of it. Four deviations."""
    ring = Ring(low, high, 0.3)((64, 64, 3), torch.Generator().manual_seed(0)).double()
    radius, angle, scale = (-ring[..., 0].exp()).exp(), ring[..., 1].exp(), ring[..., 2].exp()
    assert low - 1e-6 <= radius.min() and radius.max() <= high + 1e-6 and 0 < angle.min() and angle.max() <= 0.3 + 1e-6
    share = (radius.square() < low**2 + (high**2 - low**2) / 4).double().mean()
    assert abs(share - 0.25) < 4 * (0.25 * 0.75 / 4096) ** 0.5
    assert abs(angle.mean() - 0.15) < 4 * 0.3 / (12 * 4096) ** 0.5
    torch.testing.assert_close(scale.square(), 1 - radius.square(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"r_min": 0.99, "r_max": 0.9}, "r_min is 0.99 and r_max 0.9; eigenvalues need 0 <= r_min"),
        ({"r_max": 1.0}, "eigenvalues need 0 <= r_min < r_max < 1"),
        ({"max_phase": 0.0}, "max_phase is 0.0; it must be above 0"),
    ],
)
def test_refusals(fields: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        LRUConfig(**fields)


def test_groups_of_states_are_whole() -> None:
    with pytest.raises(ValueError, match=r"a head would be 2\.5 wide"):
        LRUConfig(num_states=10, num_heads=4).value_shape(16)
