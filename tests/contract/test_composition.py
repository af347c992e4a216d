"""Random legal combinations of everything: gradients are derivatives, and what a kind promises holds in company.

Their meshes are in tests/matrix, their exports in tests/hf; WEFT_DRAWS sets how many the slow tests draw.
"""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from models.config import LMConfig
from models.lm import LM
from tests.contract import test_contract as contract
from tests.contract.draws import MANY, draw
from tests.contract.tiny import build, describe

PROMISES: tuple[Callable[[LMConfig], None], ...] = (
    contract.test_shapes_gradients_and_dtype,
    contract.test_what_evaluation_leaves_out_changes_nothing,
    contract.test_deterministic,
    contract.test_causal,
    contract.test_rows_are_independent,
    contract.test_documents_are_isolated,
    contract.test_declared_entries_are_the_state,
    contract.test_recompute_safe,
    contract.test_meta_equals_real,
    contract.test_every_parameter_is_declared,
    contract.test_state_dict_round_trip,
    lambda config: contract.test_decode_equals_forward(config, 4),
)
# Of each direction in which a derivative is looked for, until one is found: over a step that turns another discrete
# choice there is none, and smaller ones turn fewer.
STEPS = (1e-4, 1e-5, 1e-6, 1e-6)


def smooth(config: LMConfig) -> LMConfig:
    """The config without a grid, whose gradient is by design not that of its steps."""
    if not hasattr(config.residual, "grid_bits"):
        return config
    return dataclasses.replace(config, residual=dataclasses.replace(config.residual, grid_bits=None))  # type: ignore[call-arg]


@torch.no_grad()
def slope(model: LM, direction: list[Tensor], step: float, loss: Callable[[], Tensor]) -> float:
    """The central difference of `loss` along `direction`, divided by the step."""
    sides = []
    for sign in (1, -2):
        for parameter, toward in zip(model.parameters(), direction, strict=True):
            parameter += sign * step * toward
        sides.append(float(loss()))
    for parameter, toward in zip(model.parameters(), direction, strict=True):
        parameter += step * toward
    return (sides[0] - sides[1]) / (2 * step)


def assert_gradient_is_derivative(config: LMConfig, seed: int) -> None:
    """Along a random direction, against differences at two steps, whose distance says how good they are.

    Extrapolated, they are off by a small part of that distance, and by the rounding of a loss of about 60 at 1e-16, per
    step.
    """
    model, x = contract.shaken(smooth(config)), contract.tokens()

    def loss() -> Tensor:
        found = model(x, x, keys_B=contract.KEYS).loss
        assert found is not None
        return found

    gradients = torch.autograd.grad(loss(), list(model.parameters()))
    norm = float(torch.stack([g.norm() for g in gradients]).norm())
    generator = torch.Generator().manual_seed(seed)
    found = []
    for step in STEPS:
        direction = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in model.parameters()]
        size = float(torch.stack([d.norm() for d in direction]).norm())
        direction = [d / size for d in direction]
        expected = sum(float((g * d).sum()) for g, d in zip(gradients, direction, strict=True))
        far, near = (slope(model, direction, length, loss) for length in (step, step / 2))
        error, allowed = abs((4 * near - far) / 3 - expected), abs(near - far) / 10 + 1e-13 / step * max(norm, 1)
        if error < allowed and allowed < 1e-4 * max(norm, 1):
            return
        found.append(f"{error:.1e} > {allowed:.1e}")
    raise AssertionError(f"the gradient of norm {norm:.2g} is not the derivative, off by {', '.join(found)}")


def check_draw(seed: int) -> None:
    config = draw(seed)
    try:
        assert_gradient_is_derivative(config, seed)
        for promise in PROMISES:
            promise(config)
    except Exception as error:
        raise AssertionError(f"draw {seed}, {describe(config)}: {error}") from error


@pytest.mark.parametrize("config", contract.KINDS)
def test_the_gradient_is_the_derivative(config: LMConfig) -> None:
    assert_gradient_is_derivative(config, 0)


def test_a_wrong_gradient_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one matrix in four layers' worth of them, by a hundredth."""
    made = contract.shaken

    def bent(config: LMConfig) -> LM:
        model = made(config)
        model.get_parameter("layers.1.mixer.branch.mixer.q.weight").register_hook(lambda gradient: 1.01 * gradient)
        return model

    monkeypatch.setattr(contract, "shaken", bent)
    with pytest.raises(AssertionError, match="is not the derivative"):
        assert_gradient_is_derivative(build(), 0)


@pytest.mark.parametrize("seed", range(6))
def test_random_combinations(seed: int) -> None:
    check_draw(seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", MANY)
def test_many_random_combinations(seed: int) -> None:
    check_draw(seed)
