"""What a run reports of each step, the profiler's switch, and the measure of speed."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from launch.cli import main
from parallel.mesh import Mesh
from tests.trainer import runs
from trainer import metrics
from trainer.bench import bench
from trainer.metrics import expert_loads
from trainer.profiling import ProfileConfig


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.prepare_data(tmp_path_factory.mktemp("data"))


def test_every_step_reports_all_that_users_look_for(data: Path, tmp_path: Path) -> None:
    runs.run(runs.run_config(data, tmp_path / "run"))
    records = metrics.read(tmp_path / "run")
    names = {"loss", "perplexity", "grad_norm", "lr", "tokens", "tokens_per_second", "mfu", "memory_gib", "data_wait"}
    assert {f"train/{name}" for name in names} < records[0].keys()
    assert all(0 < record["train/mfu"] < 1 and 0 <= record["train/data_wait"] < 1 for record in records)
    torch.testing.assert_close(records[0]["train/perplexity"], 2.718281828459045 ** records[0]["train/loss"])


def test_expert_loads_are_the_largest_over_the_mean() -> None:
    stats = {"layers.1.ffn.expert_load": torch.tensor([3.0, 1.0, 2.0]), "layers.2.ffn.expert_load": torch.zeros(2)}
    assert expert_loads({**stats, "layers.0.depth.gate": torch.ones(())}) == {"layers.1": 1.5}


def test_the_profiler_writes_a_trace_of_its_steps(data: Path, tmp_path: Path) -> None:
    config = runs.run_config(data, tmp_path / "run")
    train = dataclasses.replace(config.train, profile=ProfileConfig(skip=2, steps=1))
    runs.run(dataclasses.replace(config, train=train))
    trace = json.loads((tmp_path / "run" / "profile" / "rank-0.json").read_text())
    assert any(event.get("name") == "ProfilerStep#2" for event in trace["traceEvents"])


def test_bench_measures_whole_steps(data: Path, tmp_path: Path) -> None:
    config = runs.run_config(data, tmp_path / "run")
    found = bench(config, Mesh.single(), steps=2, warmup=1)
    assert found.tokens_per_s == pytest.approx(4 * 24 / found.seconds_per_step)
    assert 0 < found.mfu < 1
    assert not (tmp_path / "run").exists()


def test_bench_on_the_command_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).resolve().parents[2])
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    small = ["model.d_model=32", "data.sequence_length=16", "train.global_batch=2", "train.micro_batch=1"]
    assert main(["bench", "configs/debug_attention.yaml", *small, "--steps=1", "--warmup=0", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens_per_s"] > 0
