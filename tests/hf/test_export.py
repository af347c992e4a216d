"""Exported folders: every kind, loaded together in one process that has no Weft."""

import ast
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from configs.structure import to_plain
from models.config import LMConfig
from models.decoding import refusals
from models.hf import formats, modeling_weft, reload
from models.hf.configuration_weft import WeftConfig
from models.hf.export import CHECK_SHAPE, ExportConfig, export, write
from models.lm import LM
from tests.contract import draws, tiny
from tests.hf import user
from tests.slow import slow
from trainer.data.tokenizers.sentencepiece import SentencePiece, TokenizerConfig

OUTSIDE = "plugin-of-a-user"
OURS = ExportConfig(format="self-contained")
TOGETHER = 25  # drawn exports that one process loads
SUM = 1e-12  # float64: two orders of summation; a wrong operation shows at 1e-3


def spread(config: LMConfig) -> LM:
    return tiny.spread(config).eval()


def environment(scratch: Path) -> dict[str, str]:
    hf = {"HF_HOME": str(scratch), "HF_MODULES_CACHE": str(scratch / "modules"), "HF_HUB_OFFLINE": "1"}
    clean = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "WEFT_PLUGINS")}
    return {**clean, **hf, "TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1"}


CASES: dict[str, LMConfig] = {f"{slot}-{kind}": tiny.of_kind(slot, kind) for slot, kind in tiny.every_kind()}
CASES |= {f"drawn-{seed}": draws.draw(seed) for seed in range(3)}
CONTROLLED = {"kind": "skip_middle", "controller": {"kind": "proportional", "middle": 0.3}}
CASES["controlled"] = tiny.build(depth=CONTROLLED)
CASES["tied"] = tiny.build(num_layers=1, tie_embeddings=True)
# Last, because `user.more` takes the last: buffers, a recurrent and a growing cache.
CASES["hybrid"] = tiny.hybrid()


PLUGIN = """
import dataclasses
from torch import Tensor, nn
from models import params as learned
from models.scaling.mine_helper import half
from models.context import LayerContext
from models.slots import ScalingConfig

@dataclasses.dataclass(frozen=True)
class Mine(ScalingConfig, kind="mine"):
    power: float = 1.0

    def build(self, ctx: LayerContext) -> nn.Module:
        return Power(ctx.d_model, self.power)

class Power(nn.Module):
    def __init__(self, d_model: int, power: float) -> None:
        super().__init__()
        self.power = power
        learned.declare(self, "scale", (d_model,), learned.Constant(1.0))

    def forward(self, x: Tensor) -> Tensor:
        return half(x) * self.scale**self.power
"""
AUTHOR = """
import sys
from pathlib import Path
from tests.contract import tiny
from tests.hf.test_export import make
make(tiny.build(num_layers=1, scaling={"kind": "mine", "power": 2.0}), Path(sys.argv[1]))
"""


def make(config: LMConfig, folder: Path) -> None:
    """An unchecked export, and what it must give."""
    folder.mkdir()
    model = spread(config)
    write(config, model, folder, OURS, title=folder.name)
    tokens = torch.randint(config.vocab_size, (2, 21), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        save_file({"tokens": tokens, "logits": model(tokens).logits}, folder / "expected.safetensors")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("exports")
    plugins = root / "plugins" / "scaling"
    plugins.mkdir(parents=True)
    (plugins / "mine.py").write_text(PLUGIN)
    (plugins / "mine_helper.py").write_text("def half(x):\n    return 0.5 * x\n")
    # In a process of its own, so that the other tests do not discover this kind.
    outside = {**os.environ, "WEFT_PLUGINS": str(plugins.parent), "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([sys.executable, "-c", AUTHOR, str(root / OUTSIDE)], cwd=root, env=outside, check=True)
    for case, config in CASES.items():
        make(config, root / case)
    return {case: root / case for case in (OUTSIDE, *CASES)}


def loaded_alone(names: list[str], closely: list[str], scratch: Path) -> dict[str, Any]:
    """What a process without Weft finds in these folders. closely: a plain one and a tied one, or none."""
    asked = [json.dumps(names), json.dumps(closely)]
    command = [sys.executable, "-P", user.__file__, *asked, str(scratch / "result.json")]
    done = subprocess.run(command, cwd=scratch, env=environment(scratch), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads((scratch / "result.json").read_text())


@pytest.fixture(scope="module")
def found(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    names = [str(folder) for folder in folders.values()]
    result = loaded_alone(names, [names[-1], names[-2]], tmp_path_factory.mktemp("user"))
    return lambda case: result[str(folders[case])] if case in folders else result[case]


@pytest.mark.slow
@pytest.mark.parametrize(
    "seeds", [draws.MANY[first : first + TOGETHER] for first in range(0, len(draws.MANY), TOGETHER)], ids=str
)
@pytest.mark.timeout(600)
def test_many_random_combinations(seeds: range, tmp_path: Path) -> None:
    """Those that do not decode step by step are loaded, padded and compared all the same."""
    drawn = {str(tmp_path / f"drawn-{seed}"): draws.draw(seed) for seed in seeds}
    for name, config in drawn.items():
        make(config, Path(name))
    result = loaded_alone([*drawn], [], tmp_path)
    wrong = []
    for name, config in drawn.items():
        facts = result[name]
        errors = [facts["logits"], facts["loss"], facts["cached"], *facts["padding"].values()]
        if not max(errors) < SUM or facts["generated"] != facts["stepwise"]:
            wrong.append(f"{name}, {tiny.describe(config)}: {facts}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("case", [OUTSIDE, *CASES])
def test_round_trip(case: str, found: Callable[[str], dict[str, Any]]) -> None:
    facts = found(case)
    assert facts["dtype"] == "torch.float64"
    assert facts["logits"] < SUM
    assert facts["loss"] < SUM
    assert facts["cached"] < SUM
    assert max(facts["padding"].values()) < SUM


@pytest.mark.parametrize("case", [OUTSIDE, *CASES])
def test_generation_is_the_forward_pass_step_by_step(case: str, found: Callable[[str], dict[str, Any]]) -> None:
    facts = found(case)
    assert facts["generated"] == facts["stepwise"]
    if case in CASES and any(refusals(CASES[case])):
        assert facts["generated"] is None
        return
    # A tied model repeats itself, because a token's vector is likest its own.
    tied = case in CASES and CASES[case].tie_embeddings
    assert tied or max(len(set(tokens)) for tokens in facts["stepwise"]) > 1


def test_what_users_do_with_a_model(found: Callable[[str], dict[str, Any]]) -> None:
    more = found("more")
    assert more["half"] == ["torch.bfloat16"]
    assert more["buffers"] == ["torch.float32"]
    assert more["half_error"] < 0.2  # bfloat16 has 8 bits; these are layers whose weights are far larger than usual
    assert more["again"] == 0
    assert more["packed"] < SUM
    assert more["last"] < SUM
    assert 0.015 < more["fresh_std"] < 0.025
    assert more["chunked"] == more["greedy"]
    assert more["beams"] == more["beams_uncached"]
    assert more["loss"][0] == pytest.approx(more["loss"][1], rel=SUM)
    assert more["places"] == [
        [None, [[0, 1, 2, 3, 4]]],
        [None, [[3, 4, 5, 6, 7]]],
        [[[-1, -1, 0, 0, 0]], [[0, 0, 0, 1, 2]]],
        [[[0, 0, -1, -1, -1]], [[0, 1, 1, 1, 1]]],
        [None, [[1, 2, 3, 4, 5]]],
        [[[2, 2, 1, 1, 0]], [[0, 1, 0, 1, 0]]],
    ]
    embeds, mask, cache = more["refused"]
    assert "does not take inputs_embeds" in embeds
    assert "must be (1, 5)" in mask
    assert "DynamicCache" in cache


def test_nothing_of_weft_is_imported(folders: dict[str, Path], found: Callable[[str], dict[str, Any]]) -> None:
    for folder in folders.values():
        for file in folder.glob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                if isinstance(node, ast.ImportFrom) and not node.level:
                    names.append(node.module or "")
                assert not {name.split(".")[0] for name in names} & {"models", "configs"}, file
    assert found("modules") == ["configs", "models"]  # the two that the script blocked


def test_exports_share_a_process_without_sharing_code(found: Callable[[str], dict[str, Any]]) -> None:
    modules = [found(case)["module"] for case in (OUTSIDE, *CASES)]
    assert len(set(modules)) == len(modules)


def test_only_what_a_model_uses_is_copied(folders: dict[str, Path]) -> None:
    files = {file.name for file in folders["mixer-attention"].iterdir()}
    assert {"weft_models_mixers_attention.py", "weft_models_rope.py", "weft_models_ffn_swiglu.py"} <= files
    assert not [name for name in files if "deltanet" in name or "moe" in name or "hyper" in name]
    assert "weft_models_mixers_gated_deltanet.py" in {file.name for file in folders["mixer-gated_deltanet"].iterdir()}


def test_config_says_what_tools_look_for(tmp_path: Path) -> None:
    model = spread(tiny.build(tie_embeddings=True))
    options = dataclasses.replace(OURS, eos_id=1, max_length=64, dtype="bfloat16", generation={"temperature": 0.7})
    write(model.config, model.state_dict(), tmp_path, options, title="mine")
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "weft"
    assert config["architectures"] == ["WeftForCausalLM"]
    assert config["torch_dtype"] == "bfloat16"
    assert config["tie_word_embeddings"] and config["use_cache"]
    assert (config["vocab_size"], config["hidden_size"], config["num_hidden_layers"]) == (32, 16, 4)
    assert (config["eos_token_id"], config["max_position_embeddings"]) == (1, 64)
    assert json.loads((tmp_path / "generation_config.json").read_text()) == {"eos_token_id": 1, "temperature": 0.7}
    assert "# mine" in (tmp_path / "README.md").read_text()
    assert (tmp_path / "model.safetensors").stat().st_mode == (tmp_path / "config.json").stat().st_mode


def test_an_export_checks_itself_and_takes_its_name_last(tmp_path: Path) -> None:
    texts = [file.read_text() for file in Path(__file__).parent.glob("*.py")]
    tokenizer = SentencePiece.train(texts, TokenizerConfig(vocab_size=400))
    tokenizer.save(tmp_path)
    model = spread(tiny.build(num_layers=1, vocab_size=400)).float()
    options = dataclasses.replace(OURS, tokenizer=str(tmp_path / "tokenizer.model"), max_shard_size="20KB")
    export(model.config, model, tmp_path / "deep" / "out", options)
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["out"]
    files = {file.name for file in (tmp_path / "deep" / "out").iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", "model.safetensors.index.json"} <= files
    config = json.loads((tmp_path / "deep" / "out" / "config.json").read_text())
    assert config["eos_token_id"] == tokenizer.end_of_document


@pytest.mark.parametrize("out", ["deep/out", ".", *slow(["out"])])
def test_a_relative_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    model = spread(tiny.build(num_layers=1)).float()
    export(model.config, model, Path(out), OURS)
    assert (tmp_path / "here" / out / "config.json").is_file()
    assert [file.name for file in tmp_path.iterdir()] == ["here"]


def test_code_of_exports_that_this_process_loaded_is_not_in_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "modules" / "transformers_modules").mkdir(parents=True)
    (tmp_path / "modules" / "transformers_modules" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path / "modules")
    model = spread(tiny.build(num_layers=1)).float()
    export(model.config, model, tmp_path / "out", OURS)


def test_a_failed_check_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = spread(tiny.build(num_layers=1)).float()
    right = formats.to_plain
    wrong = {"layers": {"A": {"mixer": {"rope_theta": 100.0}}}}

    def corrupted(config: LMConfig) -> Any:
        plain = right(config)
        plain["layers"]["A"]["mixer"] |= wrong["layers"]["A"]["mixer"]
        return plain

    monkeypatch.setattr(formats, "to_plain", corrupted)
    with pytest.raises(RuntimeError, match="logits differ by"):
        export(model.config, model, tmp_path / "out", OURS)
    assert list(tmp_path.iterdir()) == []


def test_the_check_sees_a_cache_that_moves_over_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    model = modeling_weft.WeftForCausalLM(WeftConfig(weft=to_plain(tiny.hybrid())))
    model.model = spread(tiny.hybrid())
    tokens = torch.randint(32, CHECK_SHAPE, generator=torch.Generator().manual_seed(0))
    assert reload.padding_error(model, tokens) < 1e-12
    monkeypatch.setattr(modeling_weft, "tokens_first", lambda rows, documents: rows)
    assert reload.padding_error(model, tokens) > 0.01


def test_an_existing_folder_is_refused(tmp_path: Path) -> None:
    model = spread(tiny.build(num_layers=1))
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(ValueError, match="not an empty folder; export to a new one"):
        export(model.config, model, tmp_path, OURS)
    with pytest.raises(ValueError, match="not an empty folder"):
        export(model.config, model, tmp_path / "note.txt", OURS)
    assert [file.name for file in tmp_path.iterdir()] == ["note.txt"]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda state: state.pop("norm.weight"), "lack norm.weight"),
        (lambda state: state.update({"more": torch.zeros(1)}), "hold more"),
        (lambda state: state.update({"norm.weight": torch.zeros(3)}), r"norm.weight has shape \(3,\)"),
    ],
)
def test_weights_of_another_model_are_refused(
    tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], None], sentence: str
) -> None:
    model = spread(tiny.build(num_layers=1))
    state = dict(model.state_dict())
    change(state)
    with pytest.raises(ValueError, match=sentence):
        export(model.config, state, tmp_path / "out", OURS)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", ["bf17", "int8", "bool", "complex64", "nn"])
def test_a_dtype_that_holds_no_weights_is_refused(dtype: str) -> None:
    with pytest.raises(ValueError, match=f"dtype is '{dtype}'; write the name of a floating type"):
        ExportConfig(dtype=dtype)
