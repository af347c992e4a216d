"""Layers of the linear family against their published equations, written again with torch's own operations."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.config import LayerConfig
from models.context import LayerContext
from models.ffn.swiglu import SwiGLUConfig
from models.linear import LinearMixer
from models.mixers.based import BasedConfig
from models.mixers.delta_net import DeltaNetConfig
from models.mixers.gla import GLAConfig
from models.mixers.gsa import GSAConfig
from models.mixers.hgrn import HGRNConfig
from models.mixers.kda import KDAConfig
from models.mixers.linear_attention import LinearAttentionConfig
from models.mixers.retention import RetentionConfig
from models.slots import MixerConfig
from tests.models.mixers import WIDTH, run, side_of, stream
from tests.models.weights import randomize


def build(config: MixerConfig) -> tuple[LinearMixer, dict[str, Tensor]]:
    mixer = config.build(LayerContext(WIDTH, 0, (LayerConfig(config, SwiGLUConfig(1)),), norm_eps=1e-6))
    assert isinstance(mixer, LinearMixer)
    randomize(mixer, 0.5, ending="weight")
    mixer.double()
    return mixer, dict(mixer.named_parameters())


def heads(x: Tensor, weights: dict[str, Tensor], name: str, count: int) -> Tensor:
    """[B, H, T, K]"""
    return F.linear(x, weights[f"{name}.weight"]).unflatten(-1, (count, -1)).transpose(1, 2)


def weighted(weights_BHTS: Tensor, v_BHTV: Tensor) -> Tensor:
    """[B, T, H, V], over tokens that are not later."""
    return (weights_BHTS.tril() @ v_BHTV).transpose(1, 2)


@pytest.mark.parametrize("length", [1, 9, 70])
def test_retention(length: int) -> None:
    """As one product of matrices: (Q K^T * D) V with D_ts = gamma^(t - s), on rotated queries and keys."""
    mixer, weights = build(RetentionConfig(num_heads=2))
    x = stream(2, length)
    q, k, v = (heads(x, weights, name, 2) for name in "qkv")
    index = torch.arange(length, dtype=torch.float64)
    phase = index[:, None] * 10000.0 ** -(torch.arange(0, q.shape[-1], 2, dtype=torch.float64) / q.shape[-1])
    turn = torch.polar(torch.ones_like(phase), phase)

    def rotated(y: Tensor) -> Tensor:
        pairs = torch.complex(*y.chunk(2, -1)) * turn
        return torch.cat([pairs.real, pairs.imag], -1)

    gamma = 1 - 2.0 ** -(5 + torch.arange(2, dtype=torch.float64))
    decay = gamma[:, None, None] ** (index[:, None] - index).clamp_min(0)
    out = weighted(rotated(q) @ rotated(k).mT * decay * q.shape[-1] ** -0.5, v)
    out = F.rms_norm(out, out.shape[-1:], eps=1e-6).flatten(-2) * F.silu(F.linear(x, weights["gate.weight"]))
    torch.testing.assert_close(run(mixer, x, side_of(2, length))[0], F.linear(out, weights["o.weight"]))


@pytest.mark.parametrize("length", [1, 9, 70])
@pytest.mark.parametrize("normalize", [True, False])
def test_linear_attention(normalize: bool, length: int) -> None:
    mixer, weights = build(LinearAttentionConfig(num_heads=2, normalize=normalize, eps=0.1))
    x = stream(2, length)
    q, k, v = (heads(x, weights, name, 2) for name in "qkv")
    score = ((F.elu(q) + 1) @ (F.elu(k) + 1).mT * q.shape[-1] ** -0.5).tril()
    if normalize:
        score = score / (score.sum(-1, keepdim=True) + 0.1)
    expected = F.linear(weighted(score, v).flatten(-2), weights["o.weight"])
    torch.testing.assert_close(run(mixer, x, side_of(2, length))[0], expected)


@pytest.mark.parametrize("length", [1, 9, 70])
def test_based(length: int) -> None:
    mixer, weights = build(BasedConfig(num_heads=2, feature_dim=3, eps=0.1))
    x = stream(2, length)
    q, k, v = (heads(x, weights, name, 2) for name in "qkv")
    s = q @ k.mT / 3**0.5
    score = (1 + s + s**2 / 2).tril()
    score = score / (score.sum(-1, keepdim=True) + 0.1)
    expected = F.linear(weighted(score, v).flatten(-2), weights["o.weight"])
    torch.testing.assert_close(run(mixer, x, side_of(2, length))[0], expected)


@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("negative", [True, False])
def test_delta_net(negative: bool, gate: bool) -> None:
    config = DeltaNetConfig(num_heads=2, conv_size=3, output_gate=gate, allow_neg_eigval=negative)
    mixer, weights = build(config)
    x = stream(2, 9)

    def conv(name: str) -> Tensor:
        kernel = weights[f"conv_{name}"].flatten(0, 1)[:, None]
        y = F.conv1d(F.pad(F.linear(x, weights[f"{name}.weight"]).mT, (2, 0)), kernel, groups=kernel.shape[0])
        return F.silu(y).mT.unflatten(-1, (2, -1))

    q, k, v = (conv(name) for name in "qkv")
    q, k = (y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt() for y in (q, k))
    beta = F.linear(x, weights["beta.weight"]).sigmoid() * (2 if negative else 1)
    state, outs = torch.zeros(2, 2, q.shape[-1], v.shape[-1], dtype=torch.float64), []
    for t in range(9):
        missing = v[:, t] - (state.mT @ k[:, t, ..., None])[..., 0]
        state = state + beta[:, t, :, None, None] * k[:, t, ..., None] * missing[..., None, :]
        outs.append((state.mT @ q[:, t, ..., None])[..., 0] * q.shape[-1] ** -0.5)
    out = F.rms_norm(torch.stack(outs, 1), v.shape[-1:], weights["norm.weight"], 1e-6).flatten(-2)
    out = out * F.silu(F.linear(x, weights["gate.weight"])) if gate else out
    torch.testing.assert_close(run(mixer, x, side_of(2, 9))[0], F.linear(out, weights["o.weight"]))


def test_gated_slot_attention() -> None:
    """Slot by slot: each is a weighted sum of keys, and of values, that a query chooses among."""
    mixer, weights = build(GSAConfig(num_heads=4, num_kv_heads=2, num_slots=3, expand_v=2.0))
    x = stream(2, 9)
    q, k, v, f = (
        heads(x, weights, name, count) for name, count in zip(("q", "k", "v", "forget"), (4, 2, 2, 2), strict=True)
    )
    keep = F.logsigmoid(f).div(8).exp()
    slot_keys, slot_values = torch.zeros(2, 2, 3, 3).double(), torch.zeros(2, 2, 3, 6).double()
    outs = []
    for t in range(9):
        kept, written = keep[:, :, t, :, None], 1 - keep[:, :, t, :, None]
        slot_keys = kept * slot_keys + written * F.silu(k[:, :, t, None])
        slot_values = kept * slot_values + written * F.silu(v[:, :, t, None])
        score = torch.einsum("bhk,bhmk->bhm", F.silu(q[:, :, t]), slot_keys.repeat_interleave(2, 1))
        outs.append(torch.einsum("bhm,bhmv->bhv", score.softmax(-1), slot_values.repeat_interleave(2, 1)).flatten(1))
    out = F.rms_norm(F.silu(torch.stack(outs, 1)), (24,), weights["o.weight"].flatten(), 1e-6)
    torch.testing.assert_close(run(mixer, x, side_of(2, 9))[0], F.linear(out, weights["o.output.weight"]))


@pytest.mark.parametrize("conv", [None, 3])
def test_hgrn(conv: int | None) -> None:
    """The third of four layers: its gates stay above the second and third shares of the softmax over layers."""
    config = HGRNConfig(num_heads=4, expand=2.0, conv_size=conv)
    context = LayerContext(WIDTH, 2, (LayerConfig(config, SwiGLUConfig(1)),) * 4, norm_eps=1e-6)
    mixer, x = config.build(context).double(), stream(2, 9)
    randomize(mixer, 0.5)
    weights = dict(mixer.named_parameters())
    value, forget, gate = (F.linear(x, weights[f"{name}.weight"]) for name in ("v", "forget", "gate"))
    if conv:
        kernels = {name: weights[f"conv_{name}"].flatten(0, 1)[:, None] for name in ("v", "forget")}
        value, forget = (
            F.conv1d(F.pad(y.mT, (conv - 1, 0)), kernels[name], groups=24).mT
            for name, y in (("v", value), ("forget", forget))
        )
    share = weights["bounds.table"].flatten(1).softmax(0)
    keep = share[1] + share[2] + (share[0] + share[3]) * forget.sigmoid()
    state, outs = torch.zeros(2, 24, dtype=torch.float64), []
    for t in range(9):
        state = keep[:, t] * state + (1 - keep[:, t]) * F.silu(value[:, t])
        outs.append(state)
    out = F.rms_norm(torch.stack(outs, 1), (24,), weights["o.weight"].flatten(), 1e-6) * F.silu(gate)
    torch.testing.assert_close(run(mixer, x, side_of(2, 9))[0], F.linear(out, weights["o.output.weight"]))


REFUSED: dict[str, tuple[Any, str]] = {
    "a fraction of a key": (lambda: GLAConfig(num_heads=3).key_width(16), "a key head would be 2.66667 wide; it must"),
    "no value": (lambda: RetentionConfig(expand_v=0.0).value_shape(16), "a value head would be 0 wide; it must be"),
    "shared heads": (
        lambda: GLAConfig(num_heads=4, num_kv_heads=3),
        "4 is not a positive multiple of num_kv_heads 3; change",
    ),
    "a floor above": (lambda: GLAConfig(gate_floor=0.5), "gate_floor is 0.5; log decays are below 0"),
    "a gate of nothing": (lambda: GLAConfig(gate_normalizer=0.0), "gate_normalizer is 0.0; it must be above 0"),
    "value heads": (lambda: KDAConfig(num_heads=2, num_value_heads=3, head_dim=4), "every key head serves the same"),
    "an odd key": (lambda: build(RetentionConfig(num_heads=WIDTH)), "a key head is 1 wide, and pairs are rotated"),
    "a head": (lambda: build(DeltaNetConfig(num_heads=5)), f"d_model {WIDTH} is not a multiple of num_heads 5; give"),
    "a convolution": (lambda: KDAConfig(num_heads=2, head_dim=4, conv_size=1), "conv_size is 1; it must be at least 2"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_a_sentence(case: str) -> None:
    make, sentence = REFUSED[case]
    with pytest.raises(ValueError, match=sentence):
        make()
