"""The tree of a fast feed-forward against its definition, token by token."""

import pytest
import torch

from models.config import LayerConfig
from models.context import LayerContext
from models.ffn.fff import FFF, FFFConfig
from models.mixers.attention import AttentionConfig
from models.state import Side
from tests.models.weights import randomize

D_MODEL = 5


def built(depth: int, hardening: float = 1.0) -> FFF:
    config = FFFConfig(depth, 3, hardening=hardening)
    ffn = config.build(LayerContext(D_MODEL, 0, (LayerConfig(AttentionConfig(1), config),), norm_eps=1e-6))
    assert isinstance(ffn, FFF)
    randomize(ffn.double(), 1.0)
    return ffn


def leaf(ffn: FFF, index: int, x_D: torch.Tensor) -> torch.Tensor:
    hidden_F = ffn.activation(x_D @ ffn.up[index] + ffn.up_bias[index])
    return hidden_F @ ffn.down[index] + ffn.down_bias[index]


def walk(ffn: FFF, x_D: torch.Tensor, node: int, level: int) -> torch.Tensor:
    """The sum over the leaves below a node."""
    if level == ffn.depth:
        return leaf(ffn, node - (2**ffn.depth - 1), x_D)
    decision = (ffn.nodes[node] @ x_D + ffn.node_bias[node]).sigmoid()
    return (1 - decision) * walk(ffn, x_D, 2 * node + 1, level + 1) + decision * walk(ffn, x_D, 2 * node + 2, level + 1)


def side(training: bool) -> Side:
    tokens_BT = torch.zeros(2, 7, dtype=torch.int64)
    keys = torch.arange(2) if training else None
    return Side(tokens_BT, tokens_BT, keys=keys)


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_training_runs_every_leaf(depth: int) -> None:
    ffn, x_BTD = built(depth), torch.randn(2, 7, D_MODEL, dtype=torch.float64)
    result = ffn(x_BTD, {}, side(training=True))
    expected = torch.stack([walk(ffn, x_D, 0, 0) for x_D in x_BTD.flatten(0, 1)])
    torch.testing.assert_close(result.out_BTD.flatten(0, 1), expected, rtol=1e-12, atol=1e-12)
    p = (x_BTD @ ffn.nodes.T + ffn.node_bias).sigmoid()
    doubt = -(p * p.log() + (1 - p) * (1 - p).log()).mean(-1).sum()
    torch.testing.assert_close(result.losses["hardening"], doubt, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_otherwise_one_leaf(depth: int) -> None:
    ffn, x_BTD = built(depth), torch.randn(2, 7, D_MODEL, dtype=torch.float64)
    result = ffn(x_BTD, {}, side(training=False))
    torch.testing.assert_close(result.losses, ffn(x_BTD, {}, side(training=True)).losses)
    for x_D, out_D in zip(x_BTD.flatten(0, 1), result.out_BTD.flatten(0, 1), strict=True):
        node = 0
        for _ in range(depth):
            node = 2 * node + 1 + int(ffn.nodes[node] @ x_D + ffn.node_bias[node] >= 0)
        torch.testing.assert_close(out_D, leaf(ffn, node - (2**depth - 1), x_D), rtol=1e-12, atol=1e-12)


def test_certain_decisions_make_the_two_equal() -> None:
    ffn, x_BTD = built(3), torch.randn(2, 7, D_MODEL, dtype=torch.float64)
    with torch.no_grad():
        ffn.nodes.mul_(1e6)
        ffn.node_bias.mul_(1e6)
    outs = [ffn(x_BTD, {}, side(training)).out_BTD for training in (True, False)]
    torch.testing.assert_close(*outs, rtol=1e-12, atol=1e-12)


def test_padding_has_no_say_in_the_loss() -> None:
    ffn, x_BTD = built(2), torch.randn(2, 7, D_MODEL, dtype=torch.float64)
    found, keys = side(training=True), torch.arange(2)
    documents_BT = torch.zeros(2, 7, dtype=torch.int64)
    documents_BT[1, 4:] = -1
    padded = Side(found.tokens, found.positions, documents_BT, keys=keys)
    whole = ffn(x_BTD[:1], {}, Side(found.tokens[:1], found.positions[:1], keys=keys[:1]))
    rest = ffn(x_BTD[1:, :4], {}, Side(found.tokens[1:, :4], found.positions[1:, :4], keys=keys[1:]))
    total = whole.losses["hardening"] + rest.losses["hardening"]
    torch.testing.assert_close(ffn(x_BTD, {}, padded).losses["hardening"], total, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("depth", "reason"), [(0, "depth is 0"), (17, "depth is 17, which")])
def test_refuses(depth: int, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        FFFConfig(depth, leaf_hidden=2)


def test_without_hardening_there_is_no_loss() -> None:
    ffn = built(2, hardening=0.0)
    assert not ffn.has_losses
    assert not ffn(torch.randn(2, 7, D_MODEL, dtype=torch.float64), {}, side(training=True)).losses
