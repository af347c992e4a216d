"""Residual topologies that can be walked back: their recurrences, and bits restored."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models.kernels.grid_add.reference import on_grid
from models.lm import LM
from models.params import initialize
from models.residual.fixed_point import check_bits
from models.residual.midpoint import MidpointResidual, TwoStepResidual
from models.residual.midpoint_smoothed import SmoothedMidpointResidual
from models.residual.multi_split import MultiSplitResidual
from models.residual.reversible import ReversibleResidual
from models.state import State
from tests.connections import apply, causal_mean, context
from tests.contract.tiny import build


def test_reversible_streams_on_a_grid_are_restored_bit_for_bit() -> None:
    depth, width = 48, 16
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(depth, 2, width, width, generator=generator) / width**0.5
    kind = ReversibleResidual(grid_bits=14)

    def branches(index: int):
        yield "mixer", lambda u: torch.tanh(causal_mean(u) @ weights[index, 0])
        yield "ffn", lambda u: torch.tanh(u @ weights[index, 1])

    steps = [
        (kind.connect(context(width, index, depth), name, nn.Identity()), branch)
        for index in range(depth)
        for name, branch in branches(index)
    ]
    first = state = kind.open(width)(torch.randn(2, 8, width, generator=generator))
    for connection, branch in steps:
        state = apply(connection, {}, state, branch)
    assert state["x1"].abs().max() > first["x1"].abs().max()
    for connection, branch in reversed(steps):
        state = connection.undo(state, apply(connection, {}, connection.unwritten(state), branch))
    assert torch.equal(state["x1"], first["x1"]) and torch.equal(state["x2"], first["x2"])


@pytest.mark.parametrize("streams", [2, 3, 5])
def test_multi_split_changes_streams_in_turn(streams: int) -> None:
    """Y_k = X_k + G_k(max of X_{i>k}, Y_{i<k}) (arXiv 2105.14669), over branches rather than over one layer."""
    kind, depth, width = MultiSplitResidual(streams=streams), 4, 8
    layers, places = midpoint_layers(depth, width, torch.float64), [context(width, i, depth) for i in range(depth)]
    first = torch.randn(2, 5, width, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    state, expected, turn = kind.open(width)(first), [first] * streams, 0
    for place, (mixer, ffn) in zip(places, layers, strict=True):
        connections = (kind.connect(place, "mixer", nn.Identity()), kind.connect(place, "ffn", nn.Identity()))
        for connection, branch in zip(connections, (mixer, ffn), strict=True):
            state = apply(connection, {}, state, branch)
            others = torch.stack(expected[:turn] + expected[turn + 1 :])
            expected[turn] = expected[turn] + branch(others.amax(0))
            turn = (turn + 1) % streams
    for number, stream in enumerate(expected, 1):
        torch.testing.assert_close(state[f"x{number}"], stream, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(kind.close(width, depth)(state), sum(expected) / streams, rtol=1e-13, atol=1e-13)


def test_two_split_streams_are_the_reversible_residual() -> None:
    plain, split = (LM(build(residual=kind)) for kind in ("reversible", {"kind": "multi_split", "streams": 2}))
    for model in (plain, split):
        initialize(model.double(), 0)
    tokens_BT = torch.arange(12).view(2, 6)
    assert torch.equal(plain(tokens_BT).logits, split(tokens_BT).logits)


def midpoint_layers(depth: int, width: int, dtype: torch.dtype) -> list[tuple[Any, Any]]:
    """(Mixer, FFN) stand-ins."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(depth, 2, width, width, generator=generator).to(dtype) / width**0.5
    return [
        (lambda u, w=mix: torch.tanh(causal_mean(u) @ w), lambda u, w=feed: torch.tanh(u @ w)) for mix, feed in weights
    ]


def midpoint_steps(kind: TwoStepResidual, layers: list[tuple[Any, Any]], state: State) -> State:
    width = state["x"].shape[-1]
    for index, (mixer, ffn) in enumerate(layers):
        place = context(width, index, len(layers))
        state = apply(kind.connect(place, "mixer", nn.Identity()), {}, state, mixer)
        state = apply(kind.connect(place, "ffn", nn.Identity()), {}, state, ffn)
    return state


def test_midpoint_steps_over_what_plain_layers_add() -> None:
    kind, layers = MidpointResidual(step=0.3), midpoint_layers(4, 8, torch.float64)
    first = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def added(p: Tensor, index: int) -> Tensor:
        mixer, ffn = layers[index]
        plain = p + mixer(p)
        return plain + ffn(plain) - p

    streams = [first, first + 0.3 * added(first, 0)]
    for index in range(1, 4):
        streams.append(streams[-2] + 2 * 0.3 * added(streams[-1], index))
    state = midpoint_steps(kind, layers, kind.open(8)(first))
    torch.testing.assert_close(kind.close(8, 4)(state), streams[-1], rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(state["previous"], streams[-2], rtol=1e-13, atol=1e-13)


def test_the_smoothed_midpoint_s_mean_takes_single_steps() -> None:
    kind, layers = SmoothedMidpointResidual(step=0.3), midpoint_layers(5, 8, torch.float64)
    first = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    before, now, mean = first, first, first
    for mixer, ffn in layers:
        plain = now + mixer(now)
        added = plain + ffn(plain) - now
        before, now, mean = now, before + 2 * 0.3 * added, mean + 0.3 * added
    state = midpoint_steps(kind, layers, kind.open(8)(first))
    torch.testing.assert_close(state["x"], now, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(kind.close(8, 5)(state), mean, rtol=1e-13, atol=1e-13)


def test_midpoint_streams_on_a_grid_are_restored_bit_for_bit() -> None:
    kind, layers = MidpointResidual(grid_bits=14), midpoint_layers(48, 16, torch.float32)
    first = kind.open(16)(torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(1)))
    state = midpoint_steps(kind, layers, first)
    assert not torch.equal(state["x"], first["x"])
    for index, (mixer, ffn) in reversed(list(enumerate(layers))):
        place = context(16, index, len(layers))
        start, end = (kind.connect(place, branch, nn.Identity()) for branch in ("mixer", "ffn"))
        redone = apply(end, {}, apply(start, {}, end.unwritten(state), mixer), ffn)
        state = end.undo(state, redone)
    assert torch.equal(state["x"], first["x"]) and torch.equal(state["previous"], first["previous"])


def test_grid_rounds_exactly_and_passes_gradients_straight() -> None:
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)).requires_grad_()
    y = on_grid(x, 14)
    assert torch.equal(y * 2**14, torch.round(x * 2**14))
    (gradient,) = torch.autograd.grad((y * x.detach()).sum(), x)
    assert torch.equal(gradient, x.detach())


def test_grid_needs_digits() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        check_bits(14, dtype)
        with pytest.raises(ValueError, match=r"grid_bits is 24 and the stream is torch\.float32"):
            check_bits(24, dtype)
