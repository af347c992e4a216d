"""Gated DeltaNet as a mixer: convolution, documents, decoding, gated keys, initialisation."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.config import LayerConfig
from models.context import LayerContext
from models.conv import short_conv
from models.ffn.swiglu import SwiGLUConfig
from models.kernels.linear.recurrent import recurrent
from models.linear import unit
from models.mixers.gated_deltanet import GatedDeltaNet, GatedDeltaNetConfig
from models.params import initialize, named_specs
from models.slots import Cache
from models.state import Views
from tests.models.mixers import WIDTH, run, side_of, stream
from tests.models.weights import randomize

PLAIN = GatedDeltaNetConfig(num_heads=2, head_dim=4, expand_v=1.5)
GROUPED = GatedDeltaNetConfig(
    num_heads=2, head_dim=4, num_value_heads=4, expand_v=1.0, conv_size=3, conv_bias=True, allow_neg_eigval=True
)
BARE = GatedDeltaNetConfig(num_heads=1, head_dim=4, expand_v=2.0, conv_size=2, output_gate=False)
every_config = pytest.mark.parametrize("config", [PLAIN, GROUPED, BARE], ids=["plain", "grouped", "bare"])


def build(config: GatedDeltaNetConfig, dtype: torch.dtype = torch.float64) -> GatedDeltaNet:
    layers = (LayerConfig(config, SwiGLUConfig(1)),)
    mixer = config.build(LayerContext(WIDTH, 0, layers, norm_eps=1e-6))
    assert isinstance(mixer, GatedDeltaNet)
    randomize(mixer, 0.5, ending="weight")
    return mixer.to(dtype)


@every_config
def test_layer_is_its_published_equations(config: GatedDeltaNetConfig) -> None:
    """Written again from the paper, with torch's own convolution and norm."""
    mixer, x = build(config), stream(2, 9)
    weights = dict(mixer.named_parameters())

    def conv(name: str) -> Tensor:
        weight, bias = weights[f"conv_{name}"], weights.get(f"conv_{name}_bias")
        y = F.linear(x, weights[f"{name}.weight"]).mT
        y = F.conv1d(
            F.pad(y, (config.conv_size - 1, 0)),
            weight.flatten(0, 1)[:, None],
            None if bias is None else bias.flatten(),
            groups=y.shape[1],
        )
        return F.silu(y).mT.unflatten(-1, weight.shape[:2])

    strength = (2 if config.allow_neg_eigval else 1) * F.linear(x, weights["beta.weight"]).sigmoid()
    step = F.softplus(F.linear(x, weights["decay.weight"]) + weights["dt_bias"])
    q, k, v = unit(conv("q")), unit(conv("k")), conv("v")
    out, _ = recurrent(q, k, v, -weights["A_log"].exp() * step, strength, scale=config.head_dim**-0.5)
    out = F.rms_norm(out, out.shape[-1:], weights["norm.weight"], 1e-6).flatten(-2)
    if config.output_gate:
        out = out * F.silu(F.linear(x, weights["gate.weight"]))
    torch.testing.assert_close(run(mixer, x, side_of(2, 9))[0], F.linear(out, weights["o.weight"]))


def test_convolution_stays_in_its_document() -> None:
    x = stream(1, 11).unflatten(-1, (3, 4))
    weight = torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ids = torch.tensor([[0] * 5 + [1] * 2 + [2] * 4])
    out = short_conv(F.pad(x, (0, 0, 0, 0, 3, 0)), weight, None, F.pad(ids, (3, 0), value=-1))
    alone = [short_conv(F.pad(piece, (0, 0, 0, 0, 3, 0)), weight, None, None) for piece in x.split([5, 2, 4], 1)]
    torch.testing.assert_close(out, torch.cat(alone, 1))


@every_config
def test_documents_are_isolated_and_tokens_causal(config: GatedDeltaNetConfig) -> None:
    mixer, x = build(config), stream(1, 70)
    ids = torch.tensor([[3] * 30 + [1] * 33 + [-1] * 7])
    out, _ = run(mixer, x, side_of(1, 70, documents_BT=ids))
    for start, stop in ((0, 30), (30, 63)):
        alone, _ = run(mixer, x[:, start:stop], side_of(1, stop - start))
        torch.testing.assert_close(out[:, start:stop], alone, rtol=1e-11, atol=1e-11)
    changed = torch.cat([x[:, :40], -x[:, 40:]], 1)
    torch.testing.assert_close(run(mixer, changed, side_of(1, 70, documents_BT=ids))[0][:, :40], out[:, :40])


@every_config
@pytest.mark.parametrize("cuts", [(66, 1, 1, 1, 1), (1,) * 8, (2, 66, 2)], ids=["prefill", "tokens", "chunks"])
def test_decoding_equals_the_whole(config: GatedDeltaNetConfig, cuts: tuple[int, ...]) -> None:
    mixer, x = build(config), stream(2, sum(cuts))
    whole, _ = run(mixer, x, side_of(2, sum(cuts)))
    cache: Cache | None = {}
    outs, start = [], 0
    for length in cuts:
        out, cache = run(mixer, x[:, start : start + length], side_of(2, length, start), cache)
        outs.append(out)
        start += length
    torch.testing.assert_close(torch.cat(outs, 1), whole, rtol=1e-11, atol=1e-11)


@every_config
def test_rows_of_different_lengths_decode_as_if_alone(config: GatedDeltaNetConfig) -> None:
    """Row 1 is shorter than a convolution, row 2 has no token in the first call, row 3 ends before the second."""
    lengths, more = (67, 1, 0, 5), (3, 3, 3, 0)
    mixer, x = build(config), stream(4, 70)
    ids = torch.full((4, 67), -1)
    for row, length in enumerate(lengths):
        ids[row, :length] = 0
    _, cache = run(mixer, x[:, :67], side_of(4, 67, documents_BT=ids), {})
    for step in range(3):
        tokens = torch.stack([x[row, min(length + step, 69)] for row, length in enumerate(lengths)])[:, None]
        ids = torch.tensor([[0 if step < count else -1] for count in more])
        out, cache = run(mixer, tokens, side_of(4, 1, documents_BT=ids), cache)
        for row in range(3):
            length = lengths[row] + step + 1
            alone, _ = run(mixer, x[row : row + 1, :length], side_of(1, length))
            torch.testing.assert_close(out[row : row + 1], alone[:, -1:], rtol=1e-11, atol=1e-11)
    assert cache is not None
    for row, count in enumerate(length + extra for length, extra in zip(lengths, more, strict=True)):
        _, alone = run(mixer, x[row : row + 1, :count], side_of(1, count), {})
        assert alone is not None
        for name, value in alone.items():
            torch.testing.assert_close(cache[name][row : row + 1], value, rtol=1e-11, atol=1e-11)


def test_a_new_document_in_decoding_starts_anew() -> None:
    mixer, x = build(PLAIN), stream(1, 12)
    _, cache = run(mixer, x[:, :8], side_of(1, 8, documents_BT=torch.zeros(1, 8, dtype=torch.int64)), {})
    ids = torch.ones(1, 2, dtype=torch.int64)
    first, cache = run(mixer, x[:, 8:10], side_of(1, 2, documents_BT=ids), cache)
    second, _ = run(mixer, x[:, 10:], side_of(1, 2, documents_BT=ids), cache)
    torch.testing.assert_close(torch.cat([first, second], 1), run(mixer, x[:, 8:], side_of(1, 4))[0])


def test_a_gated_key_neither_writes_nor_erases() -> None:
    mixer, x = build(PLAIN), stream(1, 6)
    ones = torch.ones(1, 6, dtype=torch.float64)
    gate = torch.cat([ones[:, :5], torch.zeros(1, 1, dtype=torch.float64)], 1)
    _, before = run(mixer, x[:, :5], side_of(1, 5), {})
    _, after = run(mixer, x, side_of(1, 6), {}, gate)
    decay = mixer.project(Views.same(x), {}, side_of(1, 6))[0]["g"][:, 5].exp()
    assert before is not None and after is not None
    torch.testing.assert_close(after["state"], decay[..., None, None] * before["state"])
    torch.testing.assert_close(run(mixer, x, side_of(1, 6), None, ones)[0], run(mixer, x, side_of(1, 6))[0])


def test_initialisation_is_the_authors() -> None:
    config = GatedDeltaNetConfig(num_heads=64, head_dim=2)
    mixer = config.build(LayerContext(8, 0, (LayerConfig(config, SwiGLUConfig(1)),), 1e-6))
    initialize(mixer, seed=3)
    weights = dict(mixer.named_parameters())
    rate, step = weights["A_log"].exp(), F.softplus(weights["dt_bias"])
    assert 0 < rate.min() and rate.max() <= 16 and 6 < rate.mean() < 10
    assert 1e-3 <= step.min() * 1.001 and step.max() <= 1e-1 * 1.001 and 0.006 < step.log().mean().exp() < 0.017
    assert weights["conv_q"].abs().max() <= 0.5
    decays = {name: spec.decay for name, _, _, spec in named_specs(mixer)}
    assert not decays["A_log"] and not decays["dt_bias"] and decays["q.weight"]


@every_config
def test_declared_value_shape(config: GatedDeltaNetConfig) -> None:
    mixer = build(config)
    heads = mixer.project(Views.same(stream(1, 2)), {}, side_of(1, 2)).heads
    assert tuple(heads["v"].shape[2:]) == config.value_shape(WIDTH)
    assert config.flops_per_token(WIDTH, 16) < config.flops_per_token(WIDTH, 64) == config.flops_per_token(WIDTH, 4096)


def test_bfloat16_stays_close() -> None:
    x = stream(2, 70)
    low, _ = run(build(PLAIN, torch.bfloat16), x.bfloat16(), side_of(2, 70))
    assert low.dtype == torch.bfloat16
    high, _ = run(build(PLAIN), x, side_of(2, 70))
    assert (low.double() - high).norm() / high.norm() < 0.03


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_heads": 4, "num_value_heads": 6}, "multiple of num_heads 4"),
        ({"num_heads": 0}, "num_heads is 0"),
        ({"num_heads": 2, "expand_v": 0.3}, "whole, positive width"),
        ({"num_heads": 2, "conv_size": 1}, "conv_size is 1"),
    ],
)
def test_refusals(fields: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        GatedDeltaNetConfig(**{"head_dim": 4, **fields})
