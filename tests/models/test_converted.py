"""A plain model's weights under another residual: how far the result is from the plain model's."""

import pytest
import torch
from torch import Tensor

from models.config import LayerConfig, LMConfig
from models.ffn.swiglu import SwiGLUConfig
from models.lm import LM
from models.mixers.attention import AttentionConfig
from models.params import initialize
from models.residual.midpoint import MidpointResidual
from models.residual.midpoint_smoothed import SmoothedMidpointResidual
from models.residual.multi_split import MultiSplitResidual
from models.residual.plain import PlainResidual
from models.residual.reversible import ReversibleResidual
from models.slots import ResidualConfig
from models.state import Side

TOKENS = torch.randint(50, (2, 12), generator=torch.Generator().manual_seed(0))


def model(residual: ResidualConfig, layers: int, size: float) -> LM:
    """In float64, with branches whose last matrices are multiplied by `size`."""
    layer = LayerConfig(AttentionConfig(num_heads=2), SwiGLUConfig(hidden=24))
    config = LMConfig(50, 16, {"A": layer}, "A", layers, residual=residual)
    made = LM(config).double()
    initialize(made, seed=3)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name.endswith((".o.weight", ".down.weight")):
                parameter *= size
            elif not name.endswith("norm.weight"):
                parameter *= 10
    return made


@torch.no_grad()
def stream(made: LM) -> Tensor:
    """What the final norm reads."""
    assert made.closer is not None
    found: list[Tensor] = []
    made.closer.register_forward_hook(lambda *arguments: found.append(arguments[2]))
    made(TOKENS)
    return found[0]


@torch.no_grad()
def added(made: LM) -> list[Tensor]:
    """What each plain layer adds to the embedding, by itself."""
    assert made.embed is not None
    x = made.embed(TOKENS)
    side = Side(TOKENS, torch.arange(TOKENS.shape[1]).expand_as(TOKENS))
    return [layer({"x": x}, side, side)[0]["x"] - x for layer in made.blocks]


@pytest.mark.parametrize("residual", [MidpointResidual(step=1.0), SmoothedMidpointResidual(step=1.0)], ids=repr)
def test_one_midpoint_layer_of_step_1_is_plain(residual: ResidualConfig) -> None:
    one, other = (stream(model(kind, 1, 1.0)) for kind in (residual, PlainResidual()))
    torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("layers", [4, 5])
@pytest.mark.parametrize(
    "residual",
    [
        MidpointResidual(step=1.0),
        MidpointResidual(step=0.5),
        SmoothedMidpointResidual(step=1.0),
        SmoothedMidpointResidual(step=0.5),
        ReversibleResidual(),
        MultiSplitResidual(streams=3),
    ],
    ids=repr,
)
def test_to_first_order_in_the_branches(residual: ResidualConfig, layers: int) -> None:
    """The final stream is the embedding and a weighted sum of the branches: docs/convert.md has the weights. What is
    left is of second order: a quarter when branches are half as large."""
    if isinstance(residual, SmoothedMidpointResidual):
        weights = [residual.step] * layers
    elif isinstance(residual, MidpointResidual):
        weights = [2 * residual.step * ((layers - 1 - index) % 2 == 0) for index in range(layers)]
        weights[0] /= 2
    else:
        weights = [1 / getattr(residual, "streams", 2)] * layers
    left = []
    for size in (1e-3, 5e-4):
        plain = model(PlainResidual(), layers, size)
        other = model(residual, layers, size)
        outs = added(plain)
        difference = stream(other) - stream(plain)
        expected = sum((weight - 1) * out for weight, out in zip(weights, outs, strict=True))
        left.append((difference - expected).norm())
        # At step 1 the mean of the pair has no difference of first order.
        assert left[-1] < 0.1 * sum(out.norm() for out in outs)
    assert 0.24 < left[1] / left[0] < 0.26
