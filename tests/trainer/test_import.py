"""A model of transformers as the start of a run: the same weights on any mesh, and out again bit for bit."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig

from configs.load import load
from configs.validate import parse
from launch.cli import main
from models.hf.tokenizer import convert_sentencepiece
from parallel.mesh import MeshConfig
from parallel.testing import Pool
from tests.trainer import runs
from trainer import imported
from trainer.config import OutputConfig, RunConfig
from trainer.imported import import_model
from trainer.loop import Launch
from trainer.preflight import refuse_data


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.prepare_data(tmp_path_factory.mktemp("import"))


@pytest.fixture(scope="module")
def source(data: Path) -> Path:
    """A Llama of the tests' shape with a tokenizer, as transformers saves it."""
    folder = data.parent / "llama"
    torch.manual_seed(4)
    config = LlamaConfig(
        vocab_size=runs.VOCAB,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        bos_token_id=None,
        eos_token_id=1,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    convert_sentencepiece(data / "tokenizer.model", folder, runs.VOCAB, None)
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.6, "transformers_version": "5"}))
    return folder


@pytest.fixture(scope="module")
def model(source: Path) -> Path:
    """The imported folder; it was compared with transformers."""
    out = source.parent / "imported"
    import_model(source, out)
    return out


def started(data: Path, model: Path, folder: Path, mesh: MeshConfig | None = None) -> RunConfig:
    config = runs.run_config(data, folder, mesh, steps=2, save_every=0, micro_batch=1, dtype="float64")
    return dataclasses.replace(config, run=OutputConfig(str(folder), init_from=str(model)))


def test_out_again_with_every_bit(
    source: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(model), str(tmp_path / "out")]) == 0
    assert "step-00000000" in (printed := capsys.readouterr().out) and "as a llama model, reloaded" in printed
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert (source / "tokenizer.json").read_bytes() == (tmp_path / "out" / "tokenizer.json").read_bytes()
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation == {"eos_token_id": 1, "pad_token_id": 0, "temperature": 0.6}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["max_position_embeddings"] == 2048


def test_the_config_that_comes_with_it_trains(
    data: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = ["train.steps=1", "data.sequence_length=24", f"data.train={data}/train", f"run.dir={tmp_path}/run"]
    assert main(["train", f"{model}/config.yaml", *changes]) == 0
    assert f"starting from the weights of {model}/checkpoints/step-00000000" in capsys.readouterr().out.replace(
        "\n", ""
    )
    assert main(["eval", str(model), "--data", f"{data}/valid", "--json"]) == 0
    fresh = json.loads(capsys.readouterr().out)["loss"]
    assert main(["eval", f"{tmp_path}/run", "--data", f"{data}/valid", "--json"]) == 0
    assert abs(json.loads(capsys.readouterr().out)["loss"] - fresh) < 0.1  # one careful step away


def test_every_mesh_starts_from_the_same_weights(data: Path, model: Path, tmp_path: Path, pool: Pool) -> None:
    alone = runs.run_through(started(data, model, tmp_path / "one"))
    seeded = runs.run_through(runs.run_config(data, tmp_path / "seeded", steps=2, dtype="float64"))
    assert alone[0]["train/loss"] != pytest.approx(seeded[0]["train/loss"], rel=1e-6)
    for name, mesh in {"fsdp2": MeshConfig(fsdp=2), "tp2": MeshConfig(tp=2), "pp2": MeshConfig(pp=2)}.items():
        found = pool.run(runs.run_through, 2, started(data, model, tmp_path / name, mesh))[0]
        for record, expected in zip(found, alone, strict=True):
            assert record == pytest.approx(expected, rel=1e-9)


def test_a_run_goes_on_from_its_own_weights(data: Path, model: Path, tmp_path: Path) -> None:
    config = started(data, model, tmp_path / "run")
    runs.run(config, Launch(stop_after=1))
    lost = dataclasses.replace(config, run=dataclasses.replace(config.run, init_from=str(tmp_path / "gone")))
    refuse_data(lost)
    state, printed = runs.run(lost)
    assert state.step == 2 and "resuming after step 1" in printed
    assert runs.records(config) == runs.run_through(started(data, model, tmp_path / "whole"))


def test_another_architecture_is_refused(data: Path, model: Path, tmp_path: Path) -> None:
    config = started(data, model, tmp_path / "run")
    wide = dataclasses.replace(config, model=dataclasses.replace(config.model, d_model=32))
    sentence = "model.d_model is 32, and 16 in .*step-00000000, from which run.init_from takes the weights"
    with pytest.raises(ValueError, match=sentence):
        refuse_data(wide)
    with pytest.raises(ValueError, match=sentence):
        runs.run(wide)
    gone = dataclasses.replace(config, run=OutputConfig(str(tmp_path / "run"), init_from=str(tmp_path)))
    with pytest.raises(ValueError, match=r"run\.init_from: .* has no checkpoint; give the folder of a run"):
        refuse_data(gone)
    with pytest.raises(ValueError, match="which is dir too"):
        OutputConfig(str(model), init_from=str(model))


def test_what_training_alone_uses_may_differ(model: Path) -> None:
    config = parse(RunConfig, load(model / "config.yaml", ["model.repeat=1", "model.pattern=AA"]))
    assert config.run.init_from == str(model) and config.data.tokenizer == str(model / "tokenizer")


def test_a_failed_import_leaves_nothing(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["import", str(tmp_path), str(tmp_path / "out")]) == 2
    assert "config.json does not exist" in capsys.readouterr().err
    assert main(["import", str(source), str(source)]) == 2
    assert "exists and is not an empty folder; import to a new one" in capsys.readouterr().err
    monkeypatch.setattr(imported, "difference", lambda *_: "they differ")
    with pytest.raises(RuntimeError, match="does not compute in Weft what it does in transformers: they differ"):
        import_model(source, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    assert main(["import", str(source), str(tmp_path / "out"), "--no-check"]) == 0
    parameters = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(source).parameters())
    assert f"as a llama, {parameters:,} parameters, 2 layers, not compared" in capsys.readouterr().out
