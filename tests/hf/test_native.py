"""Models that transformers has a class for: written in its form, and computed by its code with the same results."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from models.config import LMConfig
from models.hf.architecture import Architecture, choose
from models.hf.export import ExportConfig, expected, export, write
from models.hf.formats import Native
from models.hf.reload import compare, save_check
from tests.contract import tiny
from tests.hf import native_cases
from tests.hf.double import Double
from tests.hf.native_cases import CASES, MOE, SWIGLU, attention
from tests.hf.user import PROMPTS, padded
from trainer.generate import generate

# float64: two orders of summation over a few layers; a wrong operation shows at 1e-3, and a wrong epsilon at 1e-6.
SUM = 1e-12
SCALED = {**MOE, "router": {"kind": "deepseek_v2", "scale": 2.0, "top_k": 2}}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Any]]:
    """Each case's model, and what transformers made of its export."""
    root = tmp_path_factory.mktemp("native")
    found = {}
    for index, (case, config) in enumerate(CASES.items()):
        ours, folder = native_cases.model(config), root / str(index)
        folder.mkdir()
        write(config, ours, folder, ExportConfig(format="native"), title=case)
        with Double():
            # Its grouped matrix products know no float64.
            theirs = AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float64, experts_implementation="eager"
            ).eval()
        found[case] = ours, theirs
    return found


def error(a: Tensor, b: Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


def tokens(rows: int = 2, length: int = 70) -> Tensor:
    """Longer than a chunk of the delta rule."""
    return torch.randint(32, (rows, length), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_logits_are_the_same(case: str, exported: dict[str, tuple[Any, Any]]) -> None:
    ours, theirs = exported[case]
    assert theirs.config.model_type == case.split()[0]
    assert type(theirs).__module__.startswith("transformers.")
    with Double():
        assert error(theirs(tokens()).logits, ours(tokens()).logits) < SUM
    # As users run it, where transformers' own float32 is what differs.
    single = copy.deepcopy(theirs).float()
    assert error(single(tokens()).logits.double(), ours(tokens()).logits) < Native.tolerance


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding(case: str, side: str, exported: dict[str, tuple[Any, Any]]) -> None:
    ours, theirs = exported[case]
    inputs = padded(PROMPTS, side)
    with Double():
        positions = (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)
        rows = theirs(**inputs, position_ids=positions).logits
    for row, mask, prompt in zip(rows, inputs["attention_mask"], PROMPTS, strict=True):
        assert error(row[mask > 0], ours(torch.tensor([prompt])).logits[0]) < SUM


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_generation_with_caches(case: str, exported: dict[str, tuple[Any, Any]]) -> None:
    ours, theirs = exported[case]
    inputs = padded(PROMPTS, "left")
    with Double():
        out = theirs.generate(**inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0)
    assert out[:, inputs["input_ids"].shape[1] :].tolist() == generate(ours, PROMPTS, 6)


@pytest.mark.parametrize("case", [case for case in CASES if not case.startswith("qwen3_next")])
def test_weights_keep_their_bits(case: str, exported: dict[str, tuple[Any, Any]]) -> None:
    ours, _ = exported[case]
    architecture = choose(ours.config).architecture
    state = ours.state_dict()
    for link in architecture.links(ours.config):
        back = link.to_ours(link.to_theirs([state[name] for name in link.ours]))
        assert all(torch.equal(state.pop(name), tensor) for name, tensor in zip(link.ours, back, strict=True))
    assert not state


@pytest.mark.parametrize("case", CASES)
def test_the_config_comes_back(case: str) -> None:
    architecture = choose(CASES[case]).architecture
    again = architecture.lm_config(architecture.hf_config(CASES[case]))
    assert architecture.differences(CASES[case]) == [] and architecture.matches(again) is None


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (
            native_cases.config(A=(attention(output_gate=True), SWIGLU)),
            "of the nearest, llama, layers.A.mixer.output_gate is true, and llama has false",
        ),
        (
            native_cases.config(A=(attention(rope="none"), SWIGLU)),
            "llama, layers.A.mixer.rope is none, and llama has half",
        ),
        (
            native_cases.config(A=(attention(qk_norm=True), SCALED)),
            "qwen3_moe, layers.A.ffn.router.scale is 2.0, and qwen3_moe has 1.0",
        ),
        (
            native_cases.config("AB", A=(attention(window=4), SWIGLU), B=(attention(window=5), SWIGLU)),
            "mistral, layers.B.mixer.window is 5, and mistral has 4",
        ),
        (tiny.build(residual="mudd"), "llama, residual.kind is mudd, and llama has plain"),
        (tiny.build(norm={"kind": "peri"}), "norm.kind is peri, and llama has pre"),
        (tiny.build(mixer="gated_deltanet"), "no layer has mixer attention"),
    ],
)  # fmt: skip
def test_what_no_architecture_has(config: LMConfig, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no architecture of transformers is this model") as caught:
        write(config, {}, tmp_path, ExportConfig(format="native"), title="")
    assert sentence in str(caught.value) and "use the format self-contained" in str(caught.value)


def test_spelling_and_training_make_no_difference() -> None:
    plain = native_cases.config("AA", 1, A=({"kind": "attention", "num_heads": 4}, SWIGLU))
    full = {"kind": "attention", "num_heads": 4, "num_kv_heads": 4, "head_dim": 4}
    assert choose(plain).architecture.kind == "llama"
    spelled = native_cases.config("BC", 1, B=(full, SWIGLU), C=(full, SWIGLU))
    assert choose(spelled).reason is None
    router = {"kind": "mixtral", "aux_coef": 0.5, "z_coef": 0.1, "stats_group": "microbatch"}
    trained = {**MOE, "router": router, "capacity_factor": 1.0}
    assert choose(native_cases.config(A=(attention(qk_norm=True), trained))).reason is None
    biased = {**MOE, "router": {"kind": "deepseek_v3", "top_k": 2}}
    assert "router.kind is deepseek_v3" in str(choose(native_cases.config(A=(attention(qk_norm=True), biased))).reason)


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(ValueError, match="format is 'nativ'; did you mean native"):
        ExportConfig(format="nativ")


def test_every_architecture_has_a_case() -> None:
    assert {case.split()[0] for case in CASES} == set(Architecture.kinds())


def test_a_native_export_checks_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = native_cases.model(CASES["qwen3_moe"], torch.float32)
    form = export(ours.config, ours, tmp_path / "out", ExportConfig(max_length=64, dtype="bfloat16", eos_id=3))
    assert form.label == "a qwen3_moe model"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("qwen3_moe", ["Qwen3MoeForCausalLM"])
    assert (config["bos_token_id"], config["eos_token_id"], config["max_position_embeddings"]) == (None, 3, 64)
    assert config["torch_dtype"] == "bfloat16" and "auto_map" not in config
    assert not list((tmp_path / "out").glob("*.py"))
    assert "trust_remote_code" not in (tmp_path / "out" / "README.md").read_text()


def test_a_wrong_setting_is_seen(tmp_path: Path) -> None:
    ours = native_cases.model(CASES["qwen3_moe"], torch.float32)
    written = write(ours.config, ours, tmp_path, ExportConfig(format="native"), title="")
    save_check(tmp_path / "check", expected(written))
    assert compare(str(tmp_path), str(tmp_path / "check")) is None
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "norm_topk_prob": False}))
    assert "logits differ by" in str(compare(str(tmp_path), str(tmp_path / "check")))


def test_auto_falls_back_and_says_why(tmp_path: Path) -> None:
    ours = native_cases.model(native_cases.config(A=(attention(output_gate=True), SWIGLU)), torch.float32)
    written = write(ours.config, ours, tmp_path, ExportConfig(), title="")
    assert written.format.label.startswith("a self-contained folder (not native: layers.A.mixer.output_gate is true")
    assert (tmp_path / "modeling_weft.py").is_file()
