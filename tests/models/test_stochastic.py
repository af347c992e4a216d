"""Stochastic depth: who is dropped how often, and what stands for the draws where there are none."""

import pytest
import torch
from torch import Tensor

from models.lm import LM
from models.params import initialize
from models.state import Side
from tests.contract.tiny import build

LAYERS, SURVIVAL = 4, 0.6
CHANCES = (0.9, 0.8, 0.7, 0.6)


def model_of(kind: str) -> LM:
    model = LM(build(LAYERS, depth={"kind": kind, "survival": SURVIVAL})).double()
    initialize(model, 0)
    return model


def gates(model: LM, tokens_BT: Tensor, keys_B: Tensor | None) -> list[Tensor | None]:
    found: list[Tensor | None] = []
    hooks = [layer.depth.register_forward_hook(lambda m, args, out: found.append(out[0])) for layer in model.blocks]
    model(tokens_BT, keys_B=keys_B)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize(("kind", "scaled"), [("stochastic", False), ("drop_path", True)])
def test_sequences_keep_layers_as_often_as_they_should(kind: str, scaled: bool) -> None:
    model, count = model_of(kind), 2000
    drawn = gates(model, torch.zeros(count, 2, dtype=torch.int64), torch.arange(count))
    keeps = []
    for gate, chance in zip(drawn, CHANCES, strict=True):
        assert gate is not None and torch.equal(gate[:, 0], gate[:, 1])
        assert gate.unique().tolist() == pytest.approx([0.0, 1 / chance if scaled else 1.0], rel=1e-15)
        keeps.append((gate[:, 0] > 0).double())
        # Four standard deviations of a mean of Bernoulli draws.
        assert abs(float(keeps[-1].mean()) - chance) < 4 * (chance * (1 - chance) / count) ** 0.5
    # Layers draw apart: the covariance of independent draws has about this deviation.
    assert abs(float(torch.stack(keeps).cov()[2, 3])) < 4 * (0.21 * 0.24 / count) ** 0.5


def test_without_draws_a_layer_counts_as_much_as_it_does_on_average() -> None:
    tokens = torch.arange(6).view(2, 3)
    for gate, chance in zip(gates(model_of("stochastic"), tokens, None), CHANCES, strict=True):
        assert gate is not None and torch.allclose(gate, torch.full((2, 3), chance, dtype=torch.float64))
    assert gates(model_of("drop_path"), tokens, None) == [None] * LAYERS
    plain = LM(build(LAYERS)).double()
    initialize(plain, 0)
    assert torch.equal(model_of("drop_path")(tokens).logits, plain(tokens).logits)


def test_a_dropped_sequence_passes_a_layer_as_it_is() -> None:
    model, tokens = model_of("stochastic"), torch.arange(24).view(8, 3)
    keys = torch.arange(8) * 977
    for layer in model.blocks:
        side = Side(tokens, torch.arange(3).expand(8, 3), keys=keys)
        x = torch.randn(8, 3, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        gate = layer.depth(None, {}, side)[0]
        after = layer({"x": x}, side, side)[0]["x"]
        dropped = gate[:, 0] == 0
        assert torch.equal(after[dropped], x[dropped]) and not torch.isclose(after[~dropped], x[~dropped]).all()


def test_chances_must_be_chances() -> None:
    with pytest.raises(ValueError, match=r"survival is 0.*must lie in \(0, 1\]"):
        build(depth={"kind": "stochastic", "survival": 0.0})
