"""Attention against its formula, written with loops over rows, heads and tokens."""

import cmath
import math

import pytest
import torch
from torch import Tensor

from models.config import LayerConfig
from models.context import LayerContext
from models.ffn.swiglu import SwiGLUConfig
from models.mixers.attention import Attention, AttentionConfig
from models.rope import angles, rotate, rotate_half, rotate_interleaved, swap_halves, swap_neighbours
from models.rope import turn as plain_turn
from models.slots import Cache
from models.state import Side, Views
from tests.models.mixers import WIDTH, run, side_of, stream
from tests.models.weights import randomize

CONFIGS = {
    "plain": AttentionConfig(num_heads=2),
    "grouped": AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=6, rope="interleaved", rope_theta=100.0),
    "one key head": AttentionConfig(num_heads=3, num_kv_heads=1, head_dim=2, rope="none"),
    "modern": AttentionConfig(
        num_heads=2, num_kv_heads=1, head_dim=8, rope_fraction=0.5, qk_norm=True, output_gate=True
    ),
    "window": AttentionConfig(num_heads=2, window=3),
    "window of one": AttentionConfig(num_heads=2, window=1),
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def build(config: AttentionConfig) -> Attention:
    layers = (LayerConfig(config, SwiGLUConfig(1)),)
    mixer = config.build(LayerContext(WIDTH, 0, layers, norm_eps=1e-6))
    assert isinstance(mixer, Attention)
    randomize(mixer, 0.6)
    return mixer.double()


def turn(x_K: Tensor, position: int, config: AttentionConfig) -> Tensor:
    """Each pair of channels, as one complex number, times exp(i * position * theta^(-2p/R))."""
    if config.rope == "none":
        return x_K
    pairs = int(len(x_K) * config.rope_fraction) // 2
    real, imaginary = list(x_K), list(x_K)
    out = list(x_K)
    for p in range(pairs):
        a, b = (2 * p, 2 * p + 1) if config.rope == "interleaved" else (p, p + pairs)
        factor = cmath.exp(1j * position * config.rope_theta ** (-p / pairs))
        out[a] = real[a] * factor.real - imaginary[b] * factor.imag
        out[b] = real[a] * factor.imag + imaginary[b] * factor.real
    return torch.stack(out)


def oracle(mixer: Attention, x_BTD: Tensor, side: Side, gate_BT: Tensor | None = None) -> Tensor:
    config, weights = mixer.config, dict(mixer.named_parameters())
    size, per_key = mixer.head_dim, config.num_heads // (config.num_kv_heads or config.num_heads)
    rows, length = range(x_BTD.shape[0]), range(x_BTD.shape[1])

    def head(name: str, h: int, x_D: Tensor) -> Tensor:
        y = weights[f"{name}.weight"][h * size : (h + 1) * size] @ x_D
        norm = weights.get(f"{name}_norm.weight")
        return y if norm is None else y / (y.square().mean() + 1e-6).sqrt() * norm

    outs = []
    for b in rows:
        for t in length:
            parts = []
            for h in range(config.num_heads):
                q = turn(head("q", h, x_BTD[b, t]), int(side.positions_BT[b, t]), config)
                total, mixed = torch.zeros((), dtype=torch.float64), torch.zeros(size, dtype=torch.float64)
                for s in range(t + 1):
                    if config.window is not None and t - s >= config.window:
                        continue
                    if side.documents_BT is not None and side.documents_BT[b, t] != side.documents_BT[b, s]:
                        continue
                    k = turn(head("k", h // per_key, x_BTD[b, s]), int(side.positions_BT[b, s]), config)
                    weight = (q @ k / math.sqrt(size)).exp()
                    if gate_BT is not None:
                        gate = float(gate_BT[b, s])
                        weight = weight * (gate if gate or s != t else 1.0)  # a closed key sees itself
                    total, mixed = total + weight, mixed + weight * head("v", h // per_key, x_BTD[b, s])
                parts.append(mixed / total)
            out = torch.cat(parts)
            if config.output_gate:
                out = out / (1 + (-(weights["gate.weight"] @ x_BTD[b, t])).exp())
            outs.append(weights["o.weight"] @ out)
    return torch.stack(outs).unflatten(0, x_BTD.shape[:2])


@every_config
@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
def test_outputs_and_gradients_are_the_formula(config: AttentionConfig, packed: bool) -> None:
    mixer, x = build(config), stream(2, 6).requires_grad_()
    ids = torch.tensor([[5, 5, 2, 2, 2, -1], [0, 1, 1, 1, 1, 1]]) if packed else None
    side = side_of(2, 6, documents_BT=ids)
    cotangent = stream(2, 6) * side.valid_BT[..., None]
    leaves = [x, *mixer.parameters()]
    gradients = []
    for out in (run(mixer, x, side)[0], oracle(mixer, x, side)):
        gradients.append([out * side.valid_BT[..., None], *torch.autograd.grad((out * cotangent).sum(), leaves)])
    for ours, reference in zip(*gradients, strict=True):
        assert ours.dtype == torch.float64
        torch.testing.assert_close(ours, reference, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("rotate", [rotate_half, rotate_interleaved])
def test_rotation_keeps_lengths_and_sees_distances_only(rotate) -> None:
    q, k = stream(1, 2)[:, None].unbind(2)
    q, k = q[:, :, None], k[:, :, None]

    def product(at_q: int, at_k: int) -> Tensor:
        turned = [
            rotate(x, *angles(torch.tensor([[at]]), 8, 10000.0, torch.float64)) for x, at in ((q, at_q), (k, at_k))
        ]
        torch.testing.assert_close(turned[0].norm(), q.norm())
        assert torch.equal(turned[0][..., 8:], q[..., 8:])
        return (turned[0] * turned[1]).sum()

    torch.testing.assert_close(product(9, 4), product(105, 100))
    assert not torch.isclose(product(9, 4), product(9, 5))


@pytest.mark.parametrize("swap", [swap_halves, swap_neighbours])
def test_the_rotation_back_is_the_gradient(swap) -> None:
    """What is written out against autograd's derivative of the plain formula; the angles of each pair differ."""
    x, grad = stream(2, 5).unflatten(-1, (2, -1)).requires_grad_(), stream(2, 5).unflatten(-1, (2, -1)).flip(1)
    phase = torch.randn(2, 5, 1, x.shape[-1] // 2, dtype=torch.float64)
    signs = -phase.sin(), phase.sin()
    if swap is swap_halves:
        cos, sin = torch.cat([phase.cos()] * 2, -1), torch.cat(signs, -1)
    else:
        cos, sin = torch.stack([phase.cos()] * 2, -1).flatten(-2), torch.stack(signs, -1).flatten(-2)
    got, plain = rotate(x, cos, sin, swap), plain_turn(x, cos, sin, swap)
    torch.testing.assert_close(got, plain, rtol=1e-14, atol=1e-14)
    gradients = [torch.autograd.grad(y, x, grad)[0] for y in (got, plain)]
    torch.testing.assert_close(*gradients, rtol=1e-14, atol=1e-14)


def test_a_gated_key_is_hidden_in_proportion() -> None:
    mixer, x = build(CONFIGS["grouped"]), stream(1, 5)
    gate = torch.tensor([[1.0, 0.3, 0.0, 1.0, 0.7]], dtype=torch.float64)
    torch.testing.assert_close(run(mixer, x, side_of(1, 5), None, gate)[0], oracle(mixer, x, side_of(1, 5), gate))
    open_gate = torch.ones_like(gate)
    torch.testing.assert_close(run(mixer, x, side_of(1, 5), None, open_gate)[0], run(mixer, x, side_of(1, 5))[0])


@every_config
@pytest.mark.parametrize("cuts", [(5, 1, 1), (1,) * 7, (2, 4, 1)], ids=["prefill", "tokens", "chunks"])
def test_decoding_equals_the_whole(config: AttentionConfig, cuts: tuple[int, ...]) -> None:
    mixer, x, gate = build(config), stream(2, 7), torch.rand(2, 7, dtype=torch.float64)
    for gate_BT in (None, gate):
        whole, _ = run(mixer, x, side_of(2, 7), None, gate_BT)
        cache: Cache | None = {}
        start = 0
        for length in cuts:
            piece = slice(start, start + length)
            own = None if gate_BT is None else gate_BT[:, piece]
            out, cache = run(mixer, x[:, piece], side_of(2, length, start), cache, own)
            torch.testing.assert_close(out, whole[:, piece], rtol=1e-11, atol=1e-11)
            start += length


@every_config
def test_rows_of_different_lengths_decode_as_if_alone(config: AttentionConfig) -> None:
    lengths = (5, 2, 1)
    mixer, x = build(config), stream(3, 8)
    ids = torch.full((3, 5), -1)
    for row, length in enumerate(lengths):
        ids[row, :length] = 0
    _, cache = run(mixer, x[:, :5], side_of(3, 5, documents_BT=ids), {})
    for step in range(3):
        at = torch.tensor(lengths) + step
        side = Side(torch.zeros(3, 1, dtype=torch.int64), at[:, None], torch.zeros(3, 1, dtype=torch.int64))
        out, cache = run(mixer, x[torch.arange(3), at][:, None], side, cache)
        for row, length in enumerate(at.tolist()):
            alone, _ = run(mixer, x[row : row + 1, : length + 1], side_of(1, length + 1))
            torch.testing.assert_close(out[row : row + 1], alone[:, -1:], rtol=1e-11, atol=1e-11)


@every_config
def test_declared_value_shape(config: AttentionConfig) -> None:
    mixer = build(config)
    heads = mixer.project(Views.same(stream(1, 2)), {}, side_of(1, 2)).heads
    assert tuple(heads["v"].shape[2:]) == config.value_shape(WIDTH)
    assert config.flops_per_token(WIDTH, 16) > 0


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_heads": 3, "num_kv_heads": 2}, "multiple of num_kv_heads 2"),
        ({"num_heads": 2, "window": 0}, "window is 0"),
        ({"num_heads": 2, "rope_fraction": 1.5}, "rope_fraction is 1.5"),
        ({"num_heads": 5}, "d_model 12 is not a multiple of num_heads 5"),
        ({"num_heads": 4}, "rope would turn 3 of a head's 3 channels"),
    ],
)
def test_refusals(fields: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build(AttentionConfig(**fields))
