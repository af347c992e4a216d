"""The rotation that is written out against plain torch's: values and gradients at awkward sizes."""

import pytest
import torch
from torch import Tensor

from models.rope import angles, rotate_half, rotate_interleaved, swap_halves, swap_neighbours, turn

TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 1e-2}


@pytest.mark.usefixtures("blocked")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("rotated", [2, 6, 10])
@pytest.mark.parametrize("pairing", ["half", "interleaved"])
def test_equals_torch(pairing: str, rotated: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    # Heads before tokens in memory, as what comes from elsewhere may lie.
    x = torch.randn(2, 3, 7, 10, generator=generator).to(dtype).transpose(1, 2).requires_grad_()
    grad = torch.randn(2, 7, 3, 10, generator=generator).to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    cos, sin = angles(torch.randint(1000, (2, 7), generator=generator), rotated, 100.0, wide)
    y = (rotate_half if pairing == "half" else rotate_interleaved)(x, cos, sin)
    expected = plain(x, cos, sin, pairing)
    assert y.dtype == dtype
    close(y, expected)
    close(*(torch.autograd.grad(value, x, grad)[0] for value in (y, expected)))


def plain(x: Tensor, cos: Tensor, sin: Tensor, pairing: str) -> Tensor:
    if pairing == "half":
        both, swap = (torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)), swap_halves
    else:
        both, swap = (cos.repeat_interleave(2, -1), torch.stack([-sin, sin], -1).flatten(-2)), swap_neighbours
    rotated = both[0].shape[-1]
    return torch.cat([turn(x[..., :rotated], *both, swap), x[..., rotated:]], -1)


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=TOLERANCE[a.dtype], atol=TOLERANCE[a.dtype])
