"""A run: it learns, resumes bit for bit, stops at what is not finite, and evaluates every token once."""

import dataclasses
import json
import math
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from models.hf.tokenizer import export_tokenizer
from models.kernels.attention import Softmax, attend_sdpa
from models.lm import LM
from parallel.mesh import Mesh, MeshConfig
from parallel.testing import Pool, RankError
from tests.trainer import runs
from trainer import checkpoint, evaluation, train
from trainer.data.manifest import MANIFEST
from trainer.data.sequences import Sequences
from trainer.data.tokenizers.sentencepiece import SentencePiece, TokenizerConfig
from trainer.evaluate import Evaluation
from trainer.evaluation import Request
from trainer.loop import Launch
from trainer.preflight import refuse_data
from trainer.process import build_engine
from trainer.runfolder import claimed

MESHES = {
    "one": MeshConfig(),
    "dp2": MeshConfig(dp=2),
    "fsdp2": MeshConfig(fsdp=2),
    "tp2": MeshConfig(tp=2),
    "pp2": MeshConfig(pp=2),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.prepare_data(tmp_path_factory.mktemp("run"))


def newest(folder: Path) -> checkpoint.Checkpoint:
    path = checkpoint.newest(folder / "checkpoints", warn=pytest.fail)
    assert path is not None
    return checkpoint.read(path)


def assert_same(one: checkpoint.Checkpoint, other: checkpoint.Checkpoint) -> None:
    assert one.state == other.state
    for name in ("model", "optimizer"):
        left, right = getattr(one, name), getattr(other, name)
        assert left.keys() == right.keys()
        assert all(torch.equal(left[key], right[key]) for key in left), name


def test_another_tokenizer_than_the_data_s_is_refused_before_training(data: Path, tmp_path: Path) -> None:
    """The run could never be evaluated, exported or asked for text."""
    shutil.copytree(data, tmp_path / "data")
    config = runs.run_config(tmp_path / "data", tmp_path / "run")
    tokenizer = str(tmp_path / "data" / "tokenizer.model")
    model = dataclasses.replace(config.model, vocab_size=runs.VOCAB + 8)
    config = dataclasses.replace(config, model=model, data=dataclasses.replace(config.data, tokenizer=tokenizer))
    refuse_data(config)
    words = re.sub("[^a-z ]", "", Path(__file__).read_text())
    other = SentencePiece.train([words], TokenizerConfig(vocab_size=runs.VOCAB))
    other.save(tmp_path / "data")
    manifest = json.loads((tmp_path / "data" / MANIFEST).read_text())
    manifest["tokenizer"]["sha256"] = other.sha256
    (tmp_path / "data" / MANIFEST).write_text(json.dumps(manifest))
    tokenizer = str(data / "tokenizer.model")
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=tokenizer))
    with pytest.raises(ValueError, match="were made with another tokenizer than"):
        refuse_data(config)
    # In another format it has another hash, and makes the same tokens.
    export_tokenizer(str(tmp_path / "data" / "tokenizer.model"), tmp_path, runs.VOCAB, max_length=None)
    refuse_data(dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=str(tmp_path))))
    # The data may have been moved without their tokenizer.
    (tmp_path / "data" / "tokenizer.model").unlink()
    with pytest.raises(ValueError, match="were made with another tokenizer than"):
        refuse_data(config)


@pytest.mark.parametrize("mesh", MESHES)
def test_resume_is_bitwise(data: Path, tmp_path: Path, pool: Pool, mesh: str) -> None:
    """Stopped after step 10 of 20 and resumed, a run has the losses, weights and moments of one that never stopped."""
    config = MESHES[mesh]
    size = {"steps": 20, "eval_every": 5, **({"micro_batch": 1} if mesh == "pp2" else {})}
    whole = runs.run_config(data, tmp_path / "whole", config, **size)
    parts = runs.run_config(data, tmp_path / "parts", config, **size)
    expected = pool.run(runs.run_through, config.world_size, whole)[0]
    found = pool.run(runs.run_interrupted, config.world_size, parts, 10)[0]
    assert found == expected
    assert [record["step"] for record in found if "train/loss" in record] == list(range(1, 21))
    assert_same(newest(tmp_path / "whole"), newest(tmp_path / "parts"))


@pytest.mark.parametrize("mesh", ["one", "fsdp2", "pp2"])
def test_evaluating_on_the_way_changes_nothing(data: Path, tmp_path: Path, pool: Pool, mesh: str) -> None:
    config = MESHES[mesh]
    often = runs.run_config(data, tmp_path / "often", config, eval_every=1, save_every=0, micro_batch=1)
    never = runs.run_config(data, tmp_path / "never", config, eval_every=0, save_every=0, micro_batch=1)
    found = pool.run(runs.run_through, config.world_size, often)[0]
    expected = pool.run(runs.run_through, config.world_size, never)[0]
    assert [record for record in found if "train/loss" in record] == expected


@pytest.mark.parametrize("mesh", ["dp2", "fsdp2", "tp2"])
def test_a_mesh_takes_up_what_one_process_left(data: Path, tmp_path: Path, pool: Pool, mesh: str) -> None:
    one = runs.run_config(data, tmp_path / "run", dtype="float64")
    runs.run(one, Launch(stop_after=3))
    other = dataclasses.replace(one, mesh=MESHES[mesh])
    found = pool.run(runs.run_through, 2, other)[0]
    alone = dataclasses.replace(one, run=dataclasses.replace(one.run, dir=str(tmp_path / "alone")))
    expected = runs.run_through(alone)
    for record, reference in zip(found, expected, strict=True):
        assert record == pytest.approx(reference, rel=1e-9)
    for name, value in newest(tmp_path / "run").model.items():
        torch.testing.assert_close(value, newest(tmp_path / "alone").model[name], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(("left", "taken"), [("fsdp2", "one"), ("tp2", "pp2"), ("pp2", "dp2")])
def test_another_mesh_takes_up_what_a_mesh_left(data: Path, tmp_path: Path, pool: Pool, left: str, taken: str) -> None:
    """The same tokens, and the same losses up to rounding."""
    first = runs.run_config(data, tmp_path / "run", MESHES[left], dtype="float64", micro_batch=1)
    pool.run(runs.run_to, 2, first, 3)
    second = dataclasses.replace(first, mesh=MESHES[taken])
    found = pool.run(runs.run_through, second.mesh.world_size, second)[0]
    alone = runs.run_config(data, tmp_path / "alone", dtype="float64", micro_batch=1)
    expected = runs.run_through(alone)
    assert [record["train/tokens"] for record in found] == [record["train/tokens"] for record in expected]
    for record, reference in zip(found, expected, strict=True):
        assert record == pytest.approx(reference, rel=1e-9)


def test_it_learns_and_writes_what_it_says(data: Path, tmp_path: Path) -> None:
    config = runs.run_config(data, tmp_path / "run", steps=30, eval_every=10, save_every=10, keep_checkpoints=2)
    state, printed = runs.run(config)
    assert state.step == 30 and state.samples == 120 and state.tokens == 120 * 24
    records = runs.records(config)
    losses = [record["train/loss"] for record in records if "train/loss" in record]
    assert losses[0] == pytest.approx(math.log(runs.VOCAB), rel=0.02) and losses[-1] < losses[0] - 1.5
    assert [record["step"] for record in records if "valid/loss" in record] == [10, 20, 30]
    assert list(checkpoint.steps(tmp_path / "run" / "checkpoints")) == [20, 30]
    assert list((tmp_path / "run" / "tensorboard").glob("events*"))
    assert "step 30" in printed and "saved" in printed and "held-out loss" in printed
    assert "kernels: attention blocks, head reference, linear reference, rms_norm rows" in printed
    again = train.main([str(tmp_path / "run" / "config.yaml"), "train.steps=31"])
    assert again == 0 and newest(tmp_path / "run").state.step == 31


def test_a_run_calls_the_implementations_that_it_asks_for(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[int] = []

    def counted(*args: Any) -> torch.Tensor:
        called.append(len(args))
        return attend_sdpa(*args)

    monkeypatch.setattr(Softmax, "implementations", {**Softmax.implementations, "sdpa": counted})
    config = runs.run_config(data, tmp_path / "run", steps=2)
    _, printed = runs.run(dataclasses.replace(config, kernels={"attention": "sdpa", "rms_norm": "reference"}))
    assert "kernels: attention sdpa, head reference, linear reference, rms_norm torch" in printed
    assert len(called) >= 2 * 2 * len(config.model.expanded)  # steps, micro-batches, layers


def test_a_run_at_its_end_says_so(data: Path, tmp_path: Path) -> None:
    config = runs.run_config(data, tmp_path / "run", steps=4)
    runs.run(config)
    recorded = runs.records(config)
    shorter = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=3))
    longer = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=6))
    for again, launch, end in [
        (config, None, "train.steps is 4: nothing to do; raise train.steps"),
        (shorter, None, "train.steps is 3: nothing to do; raise train.steps"),
        (config, Launch(stop_after=2), "train.steps is 4: nothing to do; raise train.steps"),
        (longer, Launch(stop_after=2), "stop_after is 2: nothing to do; raise stop_after"),
    ]:
        state, printed = runs.run(again, launch)
        assert state.step == 4 and printed == f"already at step 4, {end}\n"
    assert runs.records(config) == recorded


def test_not_finite_stops_before_the_weights_change(data: Path, tmp_path: Path) -> None:
    config = runs.run_config(data, tmp_path / "run")
    runs.run(config, Launch(stop_after=2))
    path = checkpoint.newest(tmp_path / "run" / "checkpoints", warn=pytest.fail)
    assert path is not None
    content = checkpoint.read(path)
    poisoned = {**content.model, "norm.weight": torch.full_like(content.model["norm.weight"], torch.nan)}
    checkpoint.write(path.parent, dataclasses.replace(content, model=poisoned), keep=2)
    with pytest.raises(FloatingPointError, match="step 3 has loss nan"):
        runs.run(config)
    assert list(checkpoint.steps(path.parent)) == [2]


def test_logs_without_a_checkpoint_are_an_error_unless_told(data: Path, tmp_path: Path) -> None:
    config = runs.run_config(data, tmp_path / "run")
    runs.run(config, Launch(stop_after=2))
    (path,) = checkpoint.steps(tmp_path / "run" / "checkpoints").values()
    (path / "model-00000-000.safetensors").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"all 1 checkpoints in .* are damaged"):
        runs.run(config)
    for file in path.iterdir():
        file.unlink()
    path.rmdir()
    with pytest.raises(ValueError, match="has the logs of a run and no checkpoint"):
        runs.run(config)
    runs.run(config, Launch(fresh=True))
    assert newest(tmp_path / "run").state.step == 6
    assert (tmp_path / "run" / "old-1" / "metrics.jsonl").is_file()


def test_a_folder_that_another_run_uses_is_refused(data: Path, tmp_path: Path, pool: Pool) -> None:
    """On all ranks, whatever the folder holds; and it is free again once that run is gone."""
    config = runs.run_config(data, tmp_path / "run", MeshConfig(dp=2), micro_batch=1)
    with claimed(tmp_path / "run"), pytest.raises(RankError, match=rf"in use by process {os.getpid()} on \S+; stop"):
        pool.run(runs.run_through, 2, config, timeout=60)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["lock"]
    assert len(pool.run(runs.run_through, 2, config, timeout=60)) == 2


def test_another_model_is_refused(data: Path, tmp_path: Path) -> None:
    config = runs.run_config(data, tmp_path / "run")
    runs.run(config, Launch(stop_after=2))
    with pytest.raises(ValueError, match=r"model\.tie_embeddings is True, and False in"):
        runs.run(dataclasses.replace(config, model=dataclasses.replace(config.model, tie_embeddings=True)))
    seeded = dataclasses.replace(config, run=dataclasses.replace(config.run, seed=9))
    assert "samples may repeat" in runs.run(seeded)[1]


def test_a_vocabulary_that_is_too_small_is_refused(data: Path, tmp_path: Path) -> None:
    config = runs.run_config(data, tmp_path / "run")
    small = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=300))
    with pytest.raises(ValueError, match="use at least 320"):
        runs.run(small)


@pytest.mark.parametrize("mesh", ["dp2", "tp2", "pp2"])
def test_errors_reach_every_rank(data: Path, tmp_path: Path, pool: Pool, mesh: str) -> None:
    config = runs.run_config(data, tmp_path / "run", MESHES[mesh], micro_batch=1)
    (tmp_path / "run" / "checkpoints" / "step-00000002").mkdir(parents=True)
    with pytest.raises(RankError, match="are damaged"):
        pool.run(runs.run_through, 2, config, timeout=60)


@pytest.mark.parametrize("mesh", MESHES)
def test_evaluation_predicts_every_token_once(data: Path, tmp_path: Path, pool: Pool, mesh: str) -> None:
    """On every mesh, and as a plain loop over the rows."""
    config = runs.run_config(data, tmp_path / "run", MESHES[mesh], dtype="float64", micro_batch=1)
    found = pool.run(evaluate_initial, MESHES[mesh].world_size, config)[0]
    sequences = Sequences(str(data / "valid"), 24)
    model: LM = build_engine(runs.run_config(data, tmp_path, dtype="float64"), Mesh.single()).models[0]
    loss = 0.0
    for index in range(len(sequences)):
        row = sequences.rows([index])
        out = model(row.tokens, row.targets, documents_BT=row.documents, positions_BT=row.positions)
        loss += float(out.token_loss)
    manifest = json.loads((data / "manifest.json").read_text())["splits"]["valid"]
    assert (found.tokens, found.bytes) == (manifest["tokens"], manifest["bytes"])
    assert found.loss_sum == pytest.approx(loss, rel=1e-10)
    assert found.bits_per_byte == pytest.approx(loss / math.log(2) / manifest["bytes"])


def evaluate_initial(config: runs.RunConfig) -> Evaluation:
    engine = build_engine(config, Mesh(config.mesh))
    assert config.data.valid is not None
    sequences = Sequences(config.data.valid, 24)
    return evaluation.score(engine, sequences, config.train.micro_batch, None, None, Console(quiet=True))


def test_evaluating_a_run(data: Path, tmp_path: Path) -> None:
    config = runs.run_config(data, tmp_path / "run", eval_every=6, eval_batches=1000)
    runs.run(config)
    report = evaluation.run(Request(tmp_path / "run"))
    assert Path(report.model).name == "step-00000006"
    assert runs.records(config)[-1]["valid/loss"] == report.result.loss
