"""What a run reports of each step, the profiler's switch, and the measure of speed."""

import dataclasses
import io
import json
import resource
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from launch.cli import main
from models.ffn.moe import MoEConfig
from models.memory.reversible import ReversibleConfig
from models.residual.reversible import ReversibleResidual
from parallel.mesh import Mesh
from tests.trainer import runs
from trainer import metrics
from trainer.bench import bench
from trainer.metrics import depth_used, dropped_picks, expert_loads
from trainer.profiling import ProfileConfig


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.prepare_data(tmp_path_factory.mktemp("data"))


def test_every_step_reports_all_that_users_look_for(data: Path, tmp_path: Path) -> None:
    runs.run(runs.run_config(data, tmp_path / "run"))
    records = metrics.read(tmp_path / "run")
    names = "loss perplexity grad_norm lr tokens padding tokens_per_second mfu memory_gib data_wait"
    assert {f"train/{name}" for name in names.split()} < records[0].keys()
    assert all(record["train/padding"] == 0 for record in records)
    assert all(0 < record["train/mfu"] < 1 and 0 <= record["train/data_wait"] < 1 for record in records)
    torch.testing.assert_close(records[0]["train/perplexity"], 2.718281828459045 ** records[0]["train/loss"])


def test_expert_loads_are_the_largest_over_the_mean() -> None:
    # Whole numbers, as routers count picks.
    loads = {"layers.1": torch.tensor([3, 1, 2]), "layers.2": torch.zeros(2, dtype=torch.int64)}
    stats = {f"{layer}.ffn.expert_load": load for layer, load in loads.items()}
    assert expert_loads({**stats, "layers.0.depth.gate": torch.ones(())}) == {"layers.1": 1.5}


def test_dropped_picks_are_a_share_of_all_picks() -> None:
    loads = {"layers.1": torch.tensor([3, 1, 4]), "layers.2": torch.zeros(2, dtype=torch.int64)}
    stats = {f"{layer}.ffn.expert_load": load for layer, load in loads.items()}
    assert dropped_picks(stats) == {}
    stats |= {"layers.1.ffn.expert_dropped": torch.tensor([1, 0, 1]), "layers.2.ffn.expert_dropped": torch.zeros(2)}
    assert dropped_picks(stats) == {"layers.1": 0.25, "layers.2": 0.0}


def test_steps_are_counted_per_token() -> None:
    runs = {"layers.0.depth.steps": 8.0, "layers.2.depth.steps": 4.0, "layers.4.depth.steps": 2.0, "layers.0.x": 9.0}
    assert depth_used({name: torch.tensor(value) for name, value in runs.items()}) == {"steps": 14 / 8}
    assert depth_used({}) == {}


def test_a_run_with_experts_reports_their_loads(data: Path, tmp_path: Path) -> None:
    config = runs.run_config(data, tmp_path / "run", steps=2)
    layer = dataclasses.replace(config.model.layers["A"], ffn=MoEConfig(num_experts=4, hidden=16, capacity_factor=0.8))
    runs.run(dataclasses.replace(config, model=dataclasses.replace(config.model, layers={"A": layer})))
    loads = metrics.read(tmp_path / "run")[-1]
    assert all(1 <= loads[f"experts/layers.{index}"] <= 4 for index in range(2))
    assert all(0.2 <= loads[f"dropped/layers.{index}"] < 1 for index in range(2)), "a fifth finds no room at best"


def test_drift_is_reported_and_warned_of_until_it_grows_tenfold(data: Path, tmp_path: Path) -> None:
    config = runs.run_config(data, tmp_path / "run", steps=3)
    model = dataclasses.replace(config.model, residual=ReversibleResidual())
    _, said = runs.run(dataclasses.replace(config, model=model, memory=ReversibleConfig(alarm=1e-12)))
    assert 1e-12 < metrics.read(tmp_path / "run")[-1]["memory/drift"] < 1e-5
    assert said.count("above its alarm of 1.0e-12") == 1


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


def test_a_full_disk_loses_no_record_and_no_step(tmp_path: Path) -> None:
    """Writes that fail, wholly or half-way, wait for room; the run is told once."""
    out = io.StringIO()
    with metrics.opened(tmp_path, 0, 9, Console(file=out, width=300)) as log:
        log.record(1, {"valid/loss": 1.0})
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        size = (tmp_path / "metrics.jsonl").stat().st_size
        # Files may not grow by more than half a record: as on a full disk, a part is written, then nothing.
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, hard))
        try:
            log.record(2, {"valid/loss": 2.0})
            log.record(3, {"valid/loss": 3.0})
            assert metrics.read(tmp_path) == [{"step": 1, "valid/loss": 1.0}]
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        log.record(4, {"valid/loss": 4.0})
    assert [record["step"] for record in metrics.read(tmp_path)] == [1, 2, 3, 4]
    assert out.getvalue().count("could not be written") == 1
    assert scalars(tmp_path) == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)]


def scalars(run: Path) -> list[tuple[int, float]]:
    """What TensorBoard shows of the held-out loss."""
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    return [(event.step, event.value) for event in events.Scalars("valid/loss")]


def test_tensorboard_hides_steps_that_are_taken_again(tmp_path: Path) -> None:
    for start, value in ((0, 1.0), (2, 2.0)):
        with metrics.opened(tmp_path, start, 9, Console(file=io.StringIO())) as log:
            for step in range(start + 1, start + 4):
                log.record(step, {"valid/loss": value})
    assert scalars(tmp_path) == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0), (5, 2.0)]


def test_brackets_are_no_markup(tmp_path: Path) -> None:
    out = io.StringIO()
    with metrics.opened(tmp_path, 0, 9, Console(file=out, width=20)) as log:
        log.say("saved runs/[v2]/[/red] and went on")
    assert "saved runs/[v2]/[/red] and went on" in out.getvalue()
