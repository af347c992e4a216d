"""Every debug config trains as a person first tries it: the whole loop, with validation, metrics and a checkpoint."""

import dataclasses
from pathlib import Path

import pytest

from configs.load import load
from configs.validate import parse
from parallel.mesh import MeshConfig
from tests.trainer import runs
from trainer.config import RunConfig
from trainer.engines.native import NativeConfig
from trainer.schedule.decay import Cosine

FOLDER = Path(__file__).resolve().parents[2] / "configs"
STEPS = 2


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.prepare_data(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("path", sorted(FOLDER.glob("debug_*.yaml")), ids=lambda path: path.stem)
def test_trains(path: Path, data: Path, tmp_path: Path) -> None:
    config: RunConfig = parse(RunConfig, load(path))
    config = dataclasses.replace(
        config,
        run=dataclasses.replace(config.run, dir=str(tmp_path / "run")),
        data=dataclasses.replace(
            config.data,
            train=str(data / "train"),
            valid=str(data / "valid"),
            tokenizer=str(data / "tokenizer.model"),
            sequence_length=24,
        ),
        train=dataclasses.replace(
            config.train, steps=STEPS, global_batch=4, micro_batch=2, log_every=1, eval_every=STEPS, save_every=STEPS
        ),
        schedule=Cosine(warmup=1),
        mesh=MeshConfig(),
        # The others keep what they start in the process, and have tests of their own.
        engine=NativeConfig(),
    )
    state, _ = runs.run(config)
    assert state.step == STEPS
    records = runs.records(config)
    assert [record["step"] for record in records if "train/loss" in record] == [1, 2]
    assert any("valid/loss" in record for record in records)
