"""The two-layer FFN against its formula, element by element."""

import math
from collections.abc import Callable

import pytest
import torch

from models.config import LayerConfig
from models.context import LayerContext
from models.ffn.mlp import MLP, Activation, MLPConfig
from models.mixers.attention import AttentionConfig
from models.params import initialize
from models.state import Side
from tests.models.weights import randomize


def tanh_gelu(x: float) -> float:
    """arXiv 1606.08415, section 2."""
    return 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


FORMULAS: dict[Activation, Callable[[float], float]] = {
    "gelu": lambda x: 0.5 * x * (1 + math.erf(x / math.sqrt(2))),
    "gelu_tanh": tanh_gelu,
    "relu": lambda x: max(x, 0.0),
    "relu_squared": lambda x: max(x, 0.0) ** 2,
}
D_MODEL, HIDDEN = 3, 5


def built(config: MLPConfig) -> MLP:
    made = config.build(LayerContext(D_MODEL, 0, (LayerConfig(AttentionConfig(1), config),), norm_eps=1e-6))
    assert isinstance(made, MLP)
    return made.double()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", FORMULAS)
def test_formula(activation: Activation, bias: bool) -> None:
    ffn = built(MLPConfig(HIDDEN, activation, bias))
    randomize(ffn, 1.0)
    weights = {name: p.tolist() for name, p in ffn.named_parameters()}
    assert ("up.bias" in weights) is bias and "down.bias" not in weights
    x_BTD = torch.randn(2, 3, D_MODEL, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    tokens_BT = torch.zeros(2, 3, dtype=torch.int64)
    out = ffn(x_BTD, {}, Side(tokens_BT, tokens_BT)).out_BTD
    for x_D, y_D in zip(x_BTD.flatten(0, 1).tolist(), out.flatten(0, 1).tolist(), strict=True):
        sums = [sum(w * x for w, x in zip(row, x_D, strict=True)) for row in weights["up.weight"]]
        offsets = weights.get("up.bias", [0.0] * HIDDEN)
        inner = [FORMULAS[activation](total + offset) for total, offset in zip(sums, offsets, strict=True)]
        expected = [sum(w * h for w, h in zip(row, inner, strict=True)) for row in weights["down.weight"]]
        assert y_D == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_biases_start_at_zero() -> None:
    ffn = built(MLPConfig(HIDDEN, bias=True))
    initialize(ffn, 0)
    found = dict(ffn.named_parameters())
    assert not found["up.bias"].any() and found["up.weight"].any()


def test_refuses_no_channels() -> None:
    with pytest.raises(ValueError, match="hidden is 0"):
        MLPConfig(0)
