"""Folders in Hugging Face's format as models of ours: every bit kept, or refused in one sentence."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config, Qwen3MoeConfig

from models.hf.export import ExportConfig, loaded, write
from models.hf.read import read_model
from tests.hf.double import Double

SMALL: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-3,
}
WIDE: dict[str, Any] = {**SMALL, "head_dim": 6}
MOE: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
CASES: dict[str, Any] = {
    "llama": LlamaConfig(**SMALL, head_dim=6, rope_parameters={"rope_type": "default", "rope_theta": 500}),
    "llama tied": LlamaConfig(**SMALL, tie_word_embeddings=True, max_position_embeddings=64),
    "mistral": MistralConfig(**SMALL, sliding_window=5),
    "mistral without a window": MistralConfig(**SMALL, sliding_window=None),
    "qwen2": Qwen2Config(**SMALL, tie_word_embeddings=True),
    "qwen2 with windows": Qwen2Config(**SMALL, use_sliding_window=True, sliding_window=4, max_window_layers=1),
    "qwen3": Qwen3Config(**SMALL, head_dim=6),
    "qwen3 with windows": Qwen3Config(
        **SMALL, head_dim=6, use_sliding_window=True, sliding_window=4, max_window_layers=2
    ),
    "qwen3_moe": Qwen3MoeConfig(**WIDE, **MOE, norm_topk_prob=True),
    "qwen3_moe without head_dim": Qwen3MoeConfig(**SMALL, **MOE),
    "qwen3_moe in some layers": Qwen3MoeConfig(**WIDE, **MOE, decoder_sparse_step=2),
}


def made(config: Any, folder: Path, **options: Any) -> Any:
    """A model of transformers, random everywhere, saved by it."""
    torch.manual_seed(4)
    model = AutoModelForCausalLM.from_config(config, experts_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.dim() == 1 else 0.1))
    model.save_pretrained(folder, **options)
    return model.eval()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "llama"
    made(CASES["llama"], folder)
    return folder


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_there_and_back(case: str, tmp_path: Path) -> None:
    """The logits are those of transformers, and the export holds the same bits under the same names."""
    with Double():
        theirs = made(CASES[case], tmp_path / "in").double()
    read = read_model(tmp_path / "in")
    ours = loaded(read.config, read.weights, torch.float64)
    tokens = torch.randint(32, (2, 20), generator=torch.Generator().manual_seed(3))
    expected = ours(tokens).logits
    assert expected is not None
    with Double():
        found = AutoModelForCausalLM.from_pretrained(
            tmp_path / "in", dtype=torch.float64, experts_implementation="eager"
        )(tokens).logits
    # float64: the order of sums; a wrong operation shows at 1e-3.
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert read.max_length == theirs.config.max_position_embeddings

    (tmp_path / "out").mkdir()
    written = write(read.config, read.weights, tmp_path / "out", ExportConfig(max_length=read.max_length), title="")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("in", "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    kind = case.split()[0] if case != "mistral without a window" else "llama"
    assert written.format.label == f"a {kind} model"
    if kind == theirs.config.model_type:
        again = type(theirs.config).from_pretrained(tmp_path / "out").to_dict()
        unlike = {key for key, value in theirs.config.to_dict().items() if again[key] != value}
        # The window of no layer, layers that no layer_types leaves to say, and the width of an FFN that is not there.
        assert unlike <= {"dtype", "max_window_layers", "decoder_sparse_step", "mlp_only_layers", "bos_token_id"} | (
            {"eos_token_id"}
            if kind in ("llama", "mistral")
            else {"intermediate_size"}
            if kind == "qwen3_moe"
            else set()
        )


def test_shards_types_and_copies(tmp_path: Path, source: Path) -> None:
    made(CASES["llama tied"], tmp_path / "shards", max_shard_size="4KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    shards = read_model(tmp_path / "shards")
    assert shards.max_length == 64 and "head.weight" not in shards.weights

    folder = tmp_path / "half"
    shutil.copytree(source, folder)
    state = load_file(source / "model.safetensors")
    half = {name: tensor.bfloat16() for name, tensor in state.items()}
    half["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(3)
    save_file(half, folder / "model.safetensors")
    assert {tensor.dtype for tensor in read_model(folder).weights.values()} == {torch.bfloat16}
    save_file({**half, "model.norm.weight": state["model.norm.weight"]}, folder / "model.safetensors")
    mixed = read_model(folder).weights
    assert {tensor.dtype for tensor in mixed.values()} == {torch.float32}
    assert torch.equal(mixed["embed.weight"], half["model.embed_tokens.weight"].float())

    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    with pytest.raises(ValueError, match=r"lm_head.weight is not model.embed_tokens.weight"):
        read_model(folder)
    save_file({**half, "lm_head.weight": half["model.embed_tokens.weight"].clone()}, folder / "model.safetensors")
    assert "head.weight" not in read_model(folder).weights


def test_an_old_config(tmp_path: Path, source: Path) -> None:
    """As transformers 4 wrote it."""
    folder = tmp_path / "old"
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    theta = config.pop("rope_parameters")["rope_theta"]
    (folder / "config.json").write_text(json.dumps({**config, "rope_theta": theta, "rope_scaling": None}))
    assert read_model(folder).config == read_model(source).config


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model_type": "gpt2"}, "model_type is 'gpt2'; what can be read is llama, mistral, qwen2, qwen3, qwen3_moe"),
        ({"model_type": "qwen3_next"}, "model_type is 'qwen3_next'; what can be read is"),
        ({"attention_bias": True}, "attention_bias is true, and a llama of Weft has false there"),
        ({"mlp_bias": True}, "mlp_bias is true"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', and a llama of Weft has 'silu' there"),
        ({"attention_dropout": 0.1}, "attention_dropout is 0.1"),
        (
            {"quantization_config": {"bits": 4}},
            "quantization_config is {'bits': 4}, and a llama of Weft has null there",
        ),
        ({"some_new_option": 3}, "some_new_option is 3"),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}},
            "rope_parameters.rope_type is 'linear', and a llama of Weft has 'default' there",
        ),
        (
            {"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 2.0}, "rope_theta": 500.0},
            "rope_parameters.rope_type is 'dynamic', and a llama of Weft has 'default' there",
        ),
        ({"num_attention_heads": 3}, "is not a multiple of the number of attention heads"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"num_key_value_heads": 3}, "num_heads 4 is not a positive multiple of num_kv_heads 3"),
        ({"intermediate_size": 25}, r"mlp.down_proj.weight has shape \(16, 24\); config.json says \(16, 25\)"),
        ({"num_hidden_layers": 4}, r"lacks the tensor model.layers.3.*\(9 missing\)"),
        ({"num_hidden_layers": 2}, r"holds the tensor model.layers.2.input_layernorm.weight \(9 such\)"),
    ],
)
def test_configs_that_are_refused(changes: dict[str, Any], sentence: str, tmp_path: Path, source: Path) -> None:
    folder = tmp_path / "changed"
    shutil.copytree(source, folder)
    config = {**json.loads((folder / "config.json").read_text()), **changes}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=sentence.replace("{", "\\{")) as caught:
        read_model(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("case", "changes", "sentence"),
    [
        ("qwen3", {"layer_types": ["full_attention", "chunked_attention", "full_attention"]}, "layer_types"),
        ("qwen2", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}}, "rope_parameters"),
        ("qwen3_moe", {"num_experts_per_tok": 1, "norm_topk_prob": True}, "top_k is 1, and a softmax over one pick"),
    ],
)
def test_other_architectures_refuse_too(case: str, changes: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    made(CASES[case], tmp_path)
    config = {**json.loads((tmp_path / "config.json").read_text()), **changes}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=sentence):
        read_model(tmp_path)


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def cut(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def lost_shard(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1.safetensors"}}')


def outside(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../x"}}')


def quantized(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    state["model.norm.weight"] = state["model.norm.weight"].to(torch.int8)
    save_file(state, folder / "model.safetensors")


def no_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (no_weights, "has neither model.safetensors nor model.safetensors.index.json; fetch it completely"),
        (pickled, "it has pickled weights, which transformers' save_pretrained turns into safetensors"),
        (cut, r"model.safetensors is damaged \(.*\); fetch it anew"),
        (lost_shard, "model-1.safetensors does not exist, and model.safetensors.index.json names it"),
        (outside, "has no weight_map of tensors to files beside it"),
        (quantized, "model.norm.weight has type torch.int8; quantized weights cannot be trained on"),
        (no_json, "config.json is not JSON"),
        (no_config, "config.json does not exist; give a folder in Hugging Face's format"),
    ],
)
def test_damaged_folders_are_refused(
    damage: Callable[[Path], None], sentence: str, tmp_path: Path, source: Path
) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(source, folder)
    damage(folder)
    with pytest.raises(ValueError, match=sentence):
        read_model(folder)
