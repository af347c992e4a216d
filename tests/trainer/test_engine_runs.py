"""Whole runs by DeepSpeed and Accelerate: saved, resumed by one another and by the native engine, stopped, refused."""

import dataclasses
import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.errors import ConfigError
from configs.structure import instantiate, to_plain
from configs.text import dump_yaml
from launch.local import ROOT, environment
from parallel.mesh import MeshConfig
from parallel.testing import Pool
from tests.trainer import runs
from tests.trainer.test_engines import ACCELERATE, NATIVE, ZERO, announce, packages
from tests.trainer.test_faults import poison, with_policy
from trainer import checkpoint, evaluation
from trainer.config import RunConfig
from trainer.engines.base import EngineConfig
from trainer.engines.deepspeed import DeepSpeedConfig
from trainer.faults import FAULTS, FaultsConfig
from trainer.loop import Launch
from trainer.preflight import load_run, refuse_machine

DATA = MeshConfig(dp=2)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.prepare_data(tmp_path_factory.mktemp("data"))


def by(config: RunConfig, engine: dict[str, Any]) -> RunConfig:
    return dataclasses.replace(config, engine=instantiate(EngineConfig, engine))


def take_turns(config: RunConfig, engines: list[dict[str, Any]]) -> list[dict[str, float]]:
    """Two steps by each engine, all in one run and one process; returns the records."""
    announce()
    for turn, engine in enumerate(engines, 1):
        runs.run(by(config, engine), Launch(stop_after=2 * turn))
    return runs.records(config)


def saved(folder: Path) -> dict[str, torch.Tensor]:
    content = checkpoint.read(folder / "checkpoints" / "step-00000006")
    return {**content.model, **{f"optimizer/{name}": value for name, value in content.optimizer.items()}}


@packages
@pytest.mark.parametrize(
    "engines",
    [
        pytest.param([NATIVE, ZERO[3], NATIVE], id="native-3-native"),
        pytest.param([ZERO[1], ACCELERATE, ZERO[2]], id="2-accelerate-2", marks=pytest.mark.slow),
        pytest.param([ZERO[4], ZERO[0], NATIVE], id="3-1-native", marks=pytest.mark.slow),
    ],
)
def test_a_run_goes_on_by_another_engine(data: Path, tmp_path: Path, engines: list[dict[str, Any]]) -> None:
    """With the optimiser's state: without it AdamW would begin anew. Steps are small, and eps as in test_engines."""
    config = runs.with_optim(runs.run_config(data, tmp_path / "whole", DATA, eval_every=2, micro_batch=1), eps=1e-3)
    turns = dataclasses.replace(config, run=dataclasses.replace(config.run, dir=str(tmp_path / "turns")))
    with Pool(2) as pool:
        expected = pool.run(runs.run_through, 2, config)[0]
        found = pool.run(take_turns, 2, turns, engines, timeout=200)[0]
    assert [record["step"] for record in found] == [record["step"] for record in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5), ours["step"]
    native, other = saved(tmp_path / "whole"), saved(tmp_path / "turns")
    assert native.keys() == other.keys()
    for name, value in native.items():
        scale = float(value.abs().max().clamp(min=1e-30))
        assert float((value - other[name]).abs().max()) <= 1e-5 * scale, name
    # One process reads it, as it reads any.
    request = evaluation.Request(tmp_path / "turns", limit=8)
    report, reference = (
        evaluation.run(dataclasses.replace(request, model=tmp_path / name)).result.loss for name in ("turns", "whole")
    )
    assert report == pytest.approx(reference, rel=1e-5)


def interrupted_or_not(config: RunConfig, stops: list[int]) -> list[dict[str, float]]:
    announce()
    for stop in stops:
        runs.run(config, Launch(stop_after=stop))
    return runs.records(config)


@packages
@pytest.mark.parametrize(
    "engine",
    [pytest.param(ZERO[2], id="stage2-offload", marks=pytest.mark.slow), pytest.param(ZERO[3], id="stage3")],
)
def test_what_is_resumed_is_what_was_never_stopped(data: Path, tmp_path: Path, engine: dict[str, Any]) -> None:
    found = []
    with Pool(2) as pool:
        for name, stops in (("whole", [6]), ("parts", [3, 6])):
            config = by(runs.run_config(data, tmp_path / name, DATA, dtype="bfloat16"), engine)
            found.append(pool.run(interrupted_or_not, 2, config, stops)[0])
            # Each pool's processes keep the groups of one task.
            pool.close()
    assert found[0] == found[1]
    whole, parts = saved(tmp_path / "whole"), saved(tmp_path / "parts")
    assert not [name for name, value in whole.items() if not torch.equal(value, parts[name])]


@packages
@pytest.mark.parametrize(
    "engine",
    [
        pytest.param(ACCELERATE, id="accelerate", marks=pytest.mark.slow),
        pytest.param(ZERO[2], id="stage2-offload"),
        pytest.param(ZERO[3], id="stage3", marks=pytest.mark.slow),
    ],
)
def test_a_bad_step_is_left_out(data: Path, tmp_path: Path, engine: dict[str, Any]) -> None:
    config = runs.run_config(data, tmp_path / "run", DATA, micro_batch=1)
    runs.run(dataclasses.replace(config, mesh=MeshConfig()), Launch(stop_after=2))
    step = poison(config) // config.train.global_batch + 1
    config = by(with_policy(config, FaultsConfig(policy="skip")), engine)
    with Pool(2) as pool:
        records = pool.run(interrupted_or_not, 2, config, [6])[0]
    assert [r["step"] for r in records if r.get("train/skipped")] == [step]
    assert [r["step"] for r in records if "train/loss" in r] == [n for n in range(1, 7) if n != step]
    assert len((tmp_path / "run" / FAULTS).read_text().splitlines()) == 1
    bad = [name for name, value in saved(tmp_path / "run").items() if not value.isfinite().all()]
    assert {name.removeprefix("optimizer/").split("/")[0] for name in bad} <= {"embed.weight"}


@packages
@pytest.mark.parametrize(
    ("engine", "ranks"),
    [
        pytest.param(ACCELERATE, 2, id="accelerate", marks=pytest.mark.slow),
        pytest.param(ZERO[1], 1, id="stage2-alone", marks=pytest.mark.slow),
        pytest.param(ZERO[4], 2, id="stage3"),
    ],
)
def test_a_signal_ends_processes_that_have_saved(
    data: Path, tmp_path: Path, engine: dict[str, Any], ranks: int
) -> None:
    """As weft train starts them, and with exit code 0: torch's and DeepSpeed's threads are gone by then."""
    config = by(runs.run_config(data, tmp_path / "run", MeshConfig(dp=ranks), steps=100_000, save_every=0), engine)
    file, log = tmp_path / "config.yaml", tmp_path / "log"
    file.write_text(dump_yaml(to_plain(config)))
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "launch.cli", "train", str(file)],
            env={**environment(os.environ), "OMP_NUM_THREADS": "1"},
            cwd=ROOT,
            stdout=out,
            stderr=subprocess.STDOUT,
        )
        try:
            deadline = time.monotonic() + 120
            while not runs.records(config) if (tmp_path / "run" / "metrics.jsonl").exists() else True:
                assert process.poll() is None and time.monotonic() < deadline, log.read_text()
                time.sleep(0.2)
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=60) == 0, log.read_text()
        finally:
            process.kill()
            process.wait()
    assert "asked to stop: ended after step" in log.read_text() and "Traceback" not in log.read_text()
    assert checkpoint.steps(tmp_path / "run" / "checkpoints")


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["mesh.dp=2", "mesh.tp=2"], "knows data ranks alone, and the mesh is dp=2,tp=2; use mesh.dp=4"),
        (["mesh.fsdp=2"], "knows data ranks alone, and the mesh is fsdp=2; use mesh.dp=2 and nothing else, or engine"),
        (["train.compile=true"], "does not run compiled layers; leave train.compile out"),
    ],
    ids=["tp", "fsdp", "compile"],
)
@pytest.mark.parametrize("kind", ["deepspeed", "accelerate"])
def test_what_only_the_native_engine_can_is_refused(kind: str, overrides: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_run(str(ROOT / "configs" / "debug_attention.yaml"), [f"engine.kind={kind}", *overrides])
    assert f"engine: {kind} {sentence}" in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["engine.stage=0"], "stage is 0; it is 1, 2 or 3, and replicas that share nothing are engine.kind=native"),
        (["engine.offload=all"], "offload is all, and stage 2 has the weights of the computation on every rank"),
        (
            ["optim={kind: muon, lr: 0.001}"],
            "which optim.kind=muon cannot; use optim.kind=adamw, or engine",
        ),
        (["optim.offload=16"], "optim.offload is 16.0, which is of the native engine; leave it out"),
        (["train.dtype=float64"], "deepspeed keeps weights in float32, and train.dtype is float64"),
        (["train.dtype=bfloat16", "engine.stage=1"], "use engine.stage=2, or engine.offload=optimizer"),
    ],
    ids=["stage", "offload", "muon", "state", "float64", "bfloat16"],
)
def test_what_zero_cannot_is_refused(overrides: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_run(str(ROOT / "configs" / "debug_attention.yaml"), ["engine.kind=deepspeed", *overrides])
    assert sentence in str(caught.value)


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    config = dataclasses.replace(runs.run_config(tmp_path, tmp_path, DATA), engine=DeepSpeedConfig())
    with pytest.raises(ValueError, match=r"the package deepspeed is not installed; pip install -e '.\[engines\]'"):
        refuse_machine(config)
