"""Products of float8, which torch also has on CPUs, against exact ones."""

import pytest
import torch
from torch import Tensor

from models.kernels.float8 import BACKWARD, FORWARD, float8_linear, quantized
from models.kernels.op import without_float8
from models.params import Linear

# What rounding to a type changes at most, relative to an element, and of those next to nothing to the largest one.
ROUNDING = {FORWARD: (2.0**-4, 2.0**-10 / 448), BACKWARD: (2.0**-3, 2.0**-17 / 57344)}


def draw(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).bfloat16()


def error(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The most that each element of x is off in float8."""
    relative, absolute = ROUNDING[dtype]
    x = x.double().abs()
    return x * relative + x.max() * absolute


@pytest.mark.parametrize("dtype", [FORWARD, BACKWARD])
def test_rounding_is_of_the_type(dtype: torch.dtype) -> None:
    x = draw(40, 48) * torch.logspace(-6, 6, 48).bfloat16()
    rounded, scale = quantized(x, dtype)
    assert ((rounded.double() * scale - x.double()).abs() <= error(x, dtype) * (1 + 2**-20)).all()
    zeros, scale = quantized(torch.zeros(3, 4), dtype)
    assert not zeros.float().any() and scale.isfinite()


@pytest.mark.parametrize("tokens", [(16,), (2, 5), (1,)])
@pytest.mark.parametrize("bias", [False, True])
def test_outputs_and_gradients_are_off_by_rounding_alone(tokens: tuple[int, ...], bias: bool) -> None:
    x, weight, grad = draw(*tokens, 32).requires_grad_(), draw(48, 32).requires_grad_(), draw(*tokens, 48)
    extra = draw(48).requires_grad_() if bias else None
    out = float8_linear(x, weight, extra)
    found = torch.autograd.grad(out, [x, weight] if extra is None else [x, weight, extra], grad)
    wide = [y.detach().double().flatten(0, -2) for y in (x, weight, grad)]
    bounds = [error(y, dtype) for y, dtype in zip(wide, (FORWARD, FORWARD, BACKWARD), strict=True)]
    products = {"out": (0, 1, "ni,oi->no"), "x": (2, 1, "no,oi->ni"), "weight": (2, 0, "no,ni->oi")}
    for (a, b, sum_of), ours in zip(products.values(), (out.detach(), *found[:2]), strict=True):
        exact = torch.einsum(sum_of, wide[a], wide[b])
        most = torch.einsum(sum_of, wide[a].abs(), bounds[b]) + torch.einsum(
            sum_of, bounds[a], wide[b].abs() + bounds[b]
        )
        if extra is not None and sum_of == "ni,oi->no":
            exact = exact + extra.detach().double()
        # The result is bfloat16, and so is what a bias is added to.
        most = most + 2.0**-7 * (exact.abs() + most)
        assert ((ours.double().view(exact.shape) - exact).abs() <= most).all()
    if bias:
        torch.testing.assert_close(found[2].double(), wide[2].sum(0), rtol=2.0**-7, atol=2.0**-6)


def test_widths_that_the_products_do_not_take() -> None:
    x, weight = draw(3, 20), draw(8, 20)
    assert torch.equal(float8_linear(x, weight, None), torch.nn.functional.linear(x, weight))


def test_only_matrices_are_asked() -> None:
    matrix, gate = Linear(16, 16), Linear(16, 16, role="gate")
    for one in (matrix, gate):
        one.choose("float8")
    assert matrix.call is float8_linear and gate.call is Linear.reference


def test_a_cpu_has_none() -> None:
    assert "where this is cpu" in str(without_float8(torch.device("cpu"), torch.bfloat16))
