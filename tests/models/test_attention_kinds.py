"""Relatives of softmax attention against their formulas, written with exponentials over all pairs of tokens.

Shape suffixes: B batch, T queries, S keys, H heads, J key/value heads, N slots, K width of a head.
"""

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from models.config import LayerConfig
from models.context import LayerContext
from models.ffn.swiglu import SwiGLUConfig
from models.kernels.attention import as_bias, blocked, visibility
from models.kernels.attention.by_blocks import ByBlocks, ClippedSoftmax, SoftmaxWithMemory
from models.mixers.attention import Attention, AttentionConfig
from models.mixers.clipped_softmax import ClippedSoftmaxConfig
from models.mixers.gated_attention import GatedAttentionConfig
from models.mixers.gates.base import GateConfig
from models.mixers.persistent_memory import PersistentMemoryConfig
from models.rope import angles, rotate_half
from models.slots import Cache
from models.state import Side
from tests.models.mixers import WIDTH, run, side_of, stream
from tests.models.weights import randomize

IDS = torch.tensor([[5, 5, 2, 2, 2, 2], [0, 1, 1, 1, 1, 1]])
GROUPED: dict[str, Any] = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 4}
CONFIGS: dict[str, AttentionConfig] = {
    "clipped": ClippedSoftmaxConfig(**GROUPED, gamma=-0.2, zeta=1.1, window=3, output_gate=True),
    "memory": PersistentMemoryConfig(**GROUPED, slots=3),
    "memory in a window": PersistentMemoryConfig(num_heads=2, rope="none", slots=1, window=2),
}
for kind in ("output", "values", "keys", "queries"):
    for per, activation in (("channel", "silu"), ("head", "sigmoid")):
        gate = GateConfig.of_kind(kind)(per=per, activation=activation)  # pyright: ignore[reportCallIssue]
        CONFIGS[f"gated {kind} {per}"] = GatedAttentionConfig(**GROUPED, gate=gate)
for kind in ("dense", "slice", "constant"):
    CONFIGS[f"gated {kind}"] = GatedAttentionConfig(**GROUPED, gate=GateConfig.of_kind(kind)())


def build(config: AttentionConfig) -> Attention:
    mixer = config.build(LayerContext(WIDTH, 0, (LayerConfig(config, SwiGLUConfig(1)),), norm_eps=1e-6))
    assert isinstance(mixer, Attention)
    randomize(mixer, 0.6)
    return mixer.double()


def gate_values(config: AttentionConfig, w: Mapping[str, Tensor], x_BTD: Tensor, site: str) -> Tensor | float:
    """What is multiplied at this place, [B, T, heads, 1 or K] or [B, T, D]; 1 where nothing is."""
    gate = config.gate if isinstance(config, GatedAttentionConfig) else None
    kind = gate.kind if gate else None
    if site == "output" and kind == "constant":
        return w["gated.weight"].sigmoid()[:, None]
    if site == "output" and kind == "slice":
        pieces = x_BTD.chunk(config.num_heads, -1)
        logits = [x @ a + b for x, a, b in zip(pieces, w["gated.weight"], w["gated.bias"], strict=True)]
        return torch.stack(logits, -1).sigmoid()[..., None]
    if kind != site:
        return 1.0
    y = x_BTD @ w["gated.linear.weight"].T
    y = y * y.sigmoid() if getattr(gate, "activation", "") == "silu" else y.sigmoid()
    if site == "dense":
        return y
    heads = config.value_shape(WIDTH)[0] if site in ("keys", "values") else config.num_heads
    return y.unflatten(-1, (heads, -1))


def formula(mixer: Attention, x_BTD: Tensor, side: Side, gate_BT: Tensor | None = None) -> Tensor:
    config, w, size = mixer.config, dict(mixer.named_parameters()), mixer.head_dim
    q, k, v = ((x_BTD @ w[f"{name}.weight"].T).unflatten(-1, (-1, size)) for name in "qkv")
    q = q * gate_values(config, w, x_BTD, "queries")
    k, v = k * gate_values(config, w, x_BTD, "keys"), v * gate_values(config, w, x_BTD, "values")
    group = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    plain = q
    if config.rope == "half":
        cos, sin = angles(side.positions_BT, size, config.rope_theta, torch.float64)
        q, k = rotate_half(q, cos, sin), rotate_half(k, cos, sin)
    behind_TS = torch.arange(x_BTD.shape[1])[:, None] - torch.arange(x_BTD.shape[1])
    seen_BTS = ((behind_TS >= 0) & (behind_TS < (config.window or 99))).expand(x_BTD.shape[0], -1, -1)
    if side.documents_BT is not None:
        seen_BTS = seen_BTS & (side.documents_BT[:, :, None] == side.documents_BT[:, None])
    e_BTSH = (torch.einsum("bthk,bshk->btsh", q, k) / math.sqrt(size)).exp() * seen_BTS[..., None]
    if gate_BT is not None:
        e_BTSH = e_BTSH * gate_BT[:, None, :, None]
    total, extra = e_BTSH.sum(2), torch.zeros(())
    if isinstance(config, PersistentMemoryConfig):
        keys = w["memory_k"].repeat_interleave(group, 0) * math.sqrt(size)
        values = w["memory_v"].repeat_interleave(group, 0) * math.sqrt(config.slots)
        e_BTHN = (torch.einsum("bthk,hnk->bthn", plain, keys) / math.sqrt(size)).exp()
        total = total + e_BTHN.sum(-1)
        extra = torch.einsum("bthn,hnk->bthk", e_BTHN, values) / total[..., None]
    p_BTSH = e_BTSH / total[:, :, None]
    if isinstance(config, ClippedSoftmaxConfig):
        p_BTSH = ((config.zeta - config.gamma) * p_BTSH + config.gamma).clamp(0, 1)
    out = (torch.einsum("btsh,bshk->bthk", p_BTSH, v) + extra) * gate_values(config, w, x_BTD, "output")
    if config.output_gate:
        out = out * (x_BTD @ w["gate.weight"].T).sigmoid().unflatten(-1, (-1, size))
    return out.flatten(-2) @ w["o.weight"].T * gate_values(config, w, x_BTD, "dense")


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_is_its_formula(config: AttentionConfig) -> None:
    """Outputs and all gradients, whole and packed, with a gate on keys and without; blocks of two queries."""
    mixer, x = build(config), stream(2, 6).requires_grad_()
    gate_BT = 0.2 + 0.8 * torch.rand(2, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for documents_BT, gate in ((None, None), (IDS, None), (IDS, gate_BT)):
        side, results = side_of(2, 6, documents_BT=documents_BT), []
        for out in (run(mixer, x, side, None, gate)[0], formula(mixer, x, side, gate)):
            gradients = torch.autograd.grad((out * stream(2, 6)).sum(), [x, *mixer.parameters()])
            results.append([out, *gradients])
        for ours, reference in zip(*results, strict=True):
            torch.testing.assert_close(ours, reference, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("name", ["clipped", "memory", "gated slice"])
def test_decoding_equals_the_whole(name: str) -> None:
    mixer, x = build(CONFIGS[name]), stream(2, 7)
    whole, _ = run(mixer, x, side_of(2, 7))
    cache: Cache | None = {}
    start = 0
    for length in (3, 1, 2, 1):
        out, cache = run(mixer, x[:, start : start + length], side_of(2, length, start), cache)
        torch.testing.assert_close(out, whole[:, start : start + length], rtol=1e-11, atol=1e-11)
        start += length


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", ["clipped", "memory"])
def test_blocks_are_one_block(kind: str, packed: bool, window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocked, "BLOCK", 4)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 11, h, 6, generator=generator, dtype=torch.float64) for h in (4, 2, 2))
    memory = torch.randn(2, 2, 3, 6, generator=generator, dtype=torch.float64)
    attend: ByBlocks = ClippedSoftmax(-0.1, 1.0) if kind == "clipped" else SoftmaxWithMemory(q, *memory)
    positions = torch.arange(11).expand(2, 11)
    documents = torch.arange(11).expand(2, 11) // 5 if packed else torch.zeros(2, 11, dtype=torch.int64)
    bias = as_bias(visibility(positions, documents, positions, documents, window), torch.float64)
    by_blocks = attend.causal(q, k, v, positions, documents if packed else None, window)
    torch.testing.assert_close(by_blocks, attend.masked(q, k, v, bias), rtol=1e-12, atol=1e-12)


def test_a_clipped_head_can_say_nothing() -> None:
    scores = torch.zeros(1, 40, dtype=torch.float64)
    assert ClippedSoftmax(-0.03, 1.0).weights(scores).abs().sum() == 0  # 1.03 / 40 - 0.03 < 0


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ClippedSoftmaxConfig(num_heads=2, gamma=0.1), r"gamma is 0.1; it must lie in \(-1, 0\]"),
        (lambda: ClippedSoftmaxConfig(num_heads=2, zeta=0.9), r"zeta is 0.9; it must lie in \[1, 2\)"),
        (lambda: PersistentMemoryConfig(num_heads=2, slots=0), "slots is 0; it must be at least 1"),
        (lambda: GateConfig.of_kind("constant")(start=1.0), r"start is 1.0"),  # pyright: ignore[reportCallIssue]
        (
            lambda: build(GatedAttentionConfig(num_heads=5, head_dim=2, gate=GateConfig.of_kind("slice")())),
            "cuts d_model 12 into num_heads 5 equal parts",
        ),
    ],
)
def test_refusals(make, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()
