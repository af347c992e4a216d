"""CompleteP and Depth-muP: the factors of their table, and what they do to a model; see also the coordinate check."""

import math
from typing import Any

import pytest
import torch

from models.lm import LM
from models.params import Factors, initialize, named_specs
from tests.contract.tiny import build
from tests.models.test_values import tokens
from trainer.optim.groups import GroupConfig, settings

BASE = {"base_width": 4, "base_layers": 2}  # of a model of width 16 and 8 layers, so that m_N = m_L = 4


def model(kind: str, **fields: Any) -> LM:
    return LM(build(fields.pop("num_layers", 8), scaling={"kind": kind, **BASE}, **fields))


@pytest.mark.parametrize(("kind", "alpha"), [("completep", 1.0), ("depth_mup", 0.5)])
def test_every_parameter_has_the_factors_of_the_table(kind: str, alpha: float) -> None:
    built = model(kind, mixer={"kind": "gla", "num_heads": 2, "gate_rank": 3}, ffn="moe")
    in_layers, width, depth = 4 ** (alpha - 1), 4, 4
    eps_in, eps_out = 1 / (width * depth**alpha), 1 / width
    matrix = Factors(in_layers / width, width, eps_in, width)
    vector = Factors(in_layers, 1, eps_in)
    expected = {
        "embed.weight": Factors(1, 1, eps_out),
        "head.weight": Factors(1, 1, eps_out),
        "norm.weight": Factors(1, 1, eps_out),
        "layers.3.mixer.placement.norms.0.weight": vector,
        "layers.3.mixer.branch.mixer.q.weight": matrix,
        "layers.3.mixer.branch.mixer.o.weight": matrix,
        "layers.3.mixer.branch.mixer.decay_down.weight": matrix,
        "layers.3.mixer.branch.mixer.decay_up.weight": vector,
        "layers.3.mixer.branch.mixer.decay_up.bias": vector,
        "layers.3.ffn.branch.ffn.router.weight": matrix,
        "layers.3.ffn.branch.ffn.experts.down": matrix,
    }
    found = {name: spec.factors for name, _, _, spec in named_specs(built)}
    assert {name: found[name] for name in expected} == expected
    assert built.logits_gain == 1 / 4 and built.blocks[5].ffn.scaling.factor == 4**-alpha


def test_initial_weights() -> None:
    """Matrices shrink with the root of the width; output matrices forget the depth; embedding and head stay."""
    scaled, plain = model("completep"), LM(build(2))
    for one in (scaled, plain):
        initialize(one, 0)
    ours, theirs = scaled.state_dict(), plain.state_dict()
    ratio = {name: float((ours[name] / theirs[name]).mean()) for name in theirs if ours[name].dim() == 2}
    for name, value in ratio.items():
        assert value == pytest.approx(1.0 if name in {"embed.weight", "head.weight"} else 0.5), name


def test_output_matrices_shrink_with_depth() -> None:
    """Where no scaling has another rule: with the root of the number of branches. Draws of both models are the same."""
    deep, shallow = LM(build(8)), LM(build(2))
    for one in (deep, shallow):
        initialize(one, 0)
    for name, value in shallow.state_dict().items():
        if value.dim() == 2:
            ratio = 0.5 if name.endswith(("mixer.o.weight", "ffn.down.weight")) else 1.0
            torch.testing.assert_close(deep.state_dict()[name], ratio * value, msg=name)


@pytest.mark.parametrize("kind", ["completep", "depth_mup"])
def test_the_base_model_is_the_plain_one(kind: str) -> None:
    config = build(2, scaling={"kind": kind, "base_width": 16, "base_layers": 2, "base_head_dim": 4})
    models = LM(config), LM(build(2))
    for one in models:
        initialize(one, 0)
    assert torch.equal(models[0](tokens()).logits, models[1](tokens()).logits)
    assert {spec.factors for _, _, _, spec in named_specs(models[0])} <= {Factors(), Factors(width=1.0)}


def test_gains_of_embedding_logits_and_scores() -> None:
    """Logits are scaled in the forward pass as in the loss: a known mistake leaves generation without the factor."""
    scaling = {"kind": "completep", "base_width": 16, "base_layers": 2}
    models = [
        LM(build(2, scaling={**scaling, **more}, mixer=mixer)).double()
        for more, mixer in (
            ({}, {"kind": "attention", "num_heads": 4}),
            ({"logits_scale": 3.0}, {"kind": "attention", "num_heads": 4}),
            ({"base_head_dim": 1}, {"kind": "attention", "num_heads": 4}),
            ({"base_head_dim": 1}, {"kind": "attention", "num_heads": 4, "qk_norm": True}),
        )
    ]
    for one in models:
        initialize(one, 0)
    plain, louder, halved, normed = models
    logits = plain(tokens()).logits
    torch.testing.assert_close(louder(tokens()).logits, 3 * logits)
    loss = torch.nn.functional.cross_entropy(3 * logits.flatten(0, 1), tokens().flatten(), reduction="sum")
    torch.testing.assert_close(louder(tokens(), tokens()).loss, loss)
    mixers = [one.blocks[0].mixer.branch.mixer for one in (plain, halved, normed)]
    assert [mixer.query_gain for mixer in mixers] == [1.0, 0.5, 1.0]
    with torch.no_grad():
        for layer in plain.blocks:
            layer.mixer.branch.mixer.get_parameter("q.weight").mul_(0.5)
    torch.testing.assert_close(halved(tokens()).logits, plain(tokens()).logits)


def test_optimisers_receive_the_factors() -> None:
    config = model("depth_mup").config
    found = settings(config, (GroupConfig("matrix", lr_scale=3.0, weight_decay=0.2),), 0.1)
    matrix = found["layers.0.ffn.branch.ffn.up.weight"]
    assert matrix.lr_scale == pytest.approx(3 / 8) and matrix.weight_decay == pytest.approx(0.8)
    assert matrix.eps_scale == pytest.approx(1 / 8)
    assert found["embed.weight"].lr_scale == 1 and found["embed.weight"].weight_decay == 0.1
    assert math.isclose(found["layers.0.ffn.placement.norms.0.weight"].lr_scale, 0.5)


@pytest.mark.parametrize(
    ("field", "message"),
    [("base_width", "base_width is 0; it must be at least 1"), ("logits_scale", "logits_scale is 0; .* above 0")],
)
def test_what_cannot_be_is_refused(field: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(scaling={"kind": "completep", **BASE, field: 0})
