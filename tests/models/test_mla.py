"""Multi-head latent attention against transformers' own, and its two ways of decoding."""

import pytest
import torch
from torch import Tensor
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention, DeepseekV3RotaryEmbedding

from models.config import LayerConfig
from models.context import LayerContext
from models.ffn.swiglu import SwiGLUConfig
from models.mixers.mla import MLA, MLAConfig
from models.scaling.completep import CompleteP
from models.slots import Cache, ScalingConfig
from tests.hf.double import Double
from tests.models.mixers import WIDTH, run, side_of, stream
from tests.models.weights import randomize

PLAIN = MLAConfig(num_heads=3, head_dim=4, value_dim=5, shared_dim=2, latent_dim=6)
LOW_RANK = MLAConfig(
    num_heads=2, head_dim=4, value_dim=4, shared_dim=4, latent_dim=6, query_latent_dim=7, rope="half", rope_theta=100.0
)
NO_POSITIONS = MLAConfig(num_heads=2, head_dim=4, value_dim=3, shared_dim=3, latent_dim=6, rope="none")
every_config = pytest.mark.parametrize("config", [PLAIN, LOW_RANK, NO_POSITIONS], ids=["plain", "low rank", "nope"])


def build(config: MLAConfig, own_values: bool = True, scaling: ScalingConfig | None = None) -> MLA:
    layers = (LayerConfig(config, SwiGLUConfig(1)),)
    mixer = config.build(LayerContext(WIDTH, 0, layers, norm_eps=1e-6, own_values=own_values, scaling=scaling))
    assert isinstance(mixer, MLA)
    randomize(mixer, 0.6)
    return mixer.double()


def theirs(config: MLAConfig, mixer: MLA) -> DeepseekV3Attention:
    """transformers' module with our weights."""
    hf = DeepseekV3Config(
        hidden_size=WIDTH,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_heads,
        kv_lora_rank=config.latent_dim,
        q_lora_rank=config.query_latent_dim,
        qk_rope_head_dim=config.shared_dim,
        qk_nope_head_dim=config.head_dim,
        v_head_dim=config.value_dim,
        rope_interleave=config.rope == "interleaved",
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
    )
    hf._attn_implementation = "eager"
    attention, ours = DeepseekV3Attention(hf, 0).double(), dict(mixer.named_parameters())
    by_head = [ours[f"{name}.weight"].unflatten(0, (config.num_heads, -1)) for name in ("k", "v")]
    state = {
        "kv_a_proj_with_mqa.weight": torch.cat([ours["latent.weight"], ours["shared_key.weight"]]),
        "kv_a_layernorm.weight": ours["latent_norm.weight"],
        "kv_b_proj.weight": torch.cat(by_head, 1).flatten(0, 1),
        "o_proj.weight": ours["o.weight"],
    }
    if config.query_latent_dim is None:
        state["q_proj.weight"] = ours["q.weight"]
    else:
        state |= {"q_a_proj.weight": ours["q_latent.weight"], "q_b_proj.weight": ours["q.weight"]}
        state["q_a_layernorm.weight"] = ours["q_norm.weight"]
    attention.load_state_dict(state)
    return attention


@pytest.mark.parametrize("config", [PLAIN, LOW_RANK], ids=["plain", "low rank"])
def test_equals_transformers(config: MLAConfig) -> None:
    """Outputs, the input's gradient and those of all weights, at positions that start late."""
    mixer, x = build(config), stream(2, 9).requires_grad_()
    side = side_of(2, 9, start=40)
    attention = theirs(config, mixer)
    hidden = torch.full((9, 9), -torch.inf, dtype=torch.float64).triu(1)[None, None]
    with Double():
        turns = DeepseekV3RotaryEmbedding(attention.config)(x, side.positions_BT)
        reference = attention(x, turns, hidden)[0]
    ours = run(mixer, x, side)[0]
    torch.testing.assert_close(ours, reference, rtol=1e-9, atol=1e-9)
    cotangent = stream(2, 9).flip(1)
    pairs = [("o", "o_proj"), ("latent_norm", "kv_a_layernorm")]
    pairs += [("q", "q_proj")] if config.query_latent_dim is None else [("q", "q_b_proj"), ("q_latent", "q_a_proj")]
    leaves = [x, *(mixer.get_parameter(f"{name}.weight") for name, _ in pairs)]
    their_leaves = [x, *(attention.get_parameter(f"{name}.weight") for _, name in pairs)]
    fused = ("latent", "shared_key", "k", "v")
    split = [mixer.get_parameter(f"{name}.weight") for name in fused]
    fused_leaves = [attention.get_parameter(f"{name}.weight") for name in ("kv_a_proj_with_mqa", "kv_b_proj")]
    found = torch.autograd.grad((ours * cotangent).sum(), leaves + split)
    expected = torch.autograd.grad((reference * cotangent).sum(), their_leaves + fused_leaves)
    down, up = expected[-2], expected[-1].unflatten(0, (config.num_heads, -1))
    parts = [*down.split([config.latent_dim, config.shared_dim])]
    parts += [y.flatten(0, 1) for y in up.split([config.head_dim, config.value_dim], 1)]
    for one, other in zip(found, [*expected[:-2], *parts], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def decode(mixer: MLA, x: Tensor, cuts: tuple[int, ...]) -> tuple[Tensor, Cache]:
    cache: Cache | None = {}
    outs, start = [], 0
    for length in cuts:
        out, cache = run(mixer, x[:, start : start + length], side_of(2, length, start), cache)
        outs.append(out)
        start += length
    assert cache is not None
    return torch.cat(outs, 1), cache


@every_config
@pytest.mark.parametrize("own_values", [True, False])
def test_decoding_equals_the_whole_and_keeps_latents_alone(config: MLAConfig, own_values: bool) -> None:
    mixer, x = build(config, own_values), stream(2, 9)
    out, cache = decode(mixer, x, (4, 1, 3, 1))
    torch.testing.assert_close(out, run(mixer, x, side_of(2, 9))[0], rtol=1e-11, atol=1e-11)
    kept = sum(value.shape[2:].numel() for name, value in cache.items() if name not in ("positions", "documents"))
    values = 0 if own_values else config.num_heads * config.value_dim
    assert kept == config.latent_dim + config.shared_dim + values


@every_config
def test_documents_are_isolated(config: MLAConfig) -> None:
    mixer, x = build(config), stream(1, 12)
    ids = torch.tensor([[3] * 5 + [1] * 4 + [-1] * 3])
    side = side_of(1, 12, documents_BT=ids)
    for cache in (None, {}):
        out, _ = run(mixer, x, side, cache)
        for start, stop in ((0, 5), (5, 9)):
            alone, _ = run(mixer, x[:, start:stop], side_of(1, stop - start))
            torch.testing.assert_close(out[:, start:stop], alone, rtol=1e-11, atol=1e-11)


@every_config
def test_queries_have_the_size_that_a_scaling_gives_them(config: MLAConfig) -> None:
    """Of heads with a quarter of the base model's width: twice."""
    base = CompleteP(WIDTH, 1, base_head_dim=4 * (config.head_dim + config.shared_dim))
    scaled, plain = build(config, scaling=base), build(config)
    x_BTD, side = stream(2, 7), side_of(2, 7)
    expected, _ = run(plain, x_BTD, side)
    assert not torch.allclose(run(scaled, x_BTD, side)[0], expected)
    with torch.no_grad():
        scaled.q.weight.div_(2)
    torch.testing.assert_close(run(scaled, x_BTD, side)[0], expected, rtol=1e-12, atol=1e-12)


def test_an_odd_shared_key_is_refused() -> None:
    with pytest.raises(ValueError, match="shared_dim is 3, and rope turns pairs"):
        MLAConfig(num_heads=2, shared_dim=3)
