"""Losses that are not finite: which samples made them is written down, and a run stops or leaves the step out."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from parallel.mesh import MeshConfig
from parallel.testing import Pool
from tests.trainer import runs
from trainer import checkpoint
from trainer.config import RunConfig
from trainer.data.training import TrainingData
from trainer.faults import FAULTS, FaultsConfig
from trainer.loop import Launch


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.prepare_data(tmp_path_factory.mktemp("data"))


def with_policy(config: RunConfig, faults: FaultsConfig) -> RunConfig:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, faults=faults))


def poison(config: RunConfig) -> int:
    """Give a run that has taken 2 steps an embedding of NaN for a token that one of the later samples alone has.

    Returns that sample.
    """
    steps, size = config.train.steps, config.train.global_batch
    samples = TrainingData(config.data.weights, config.data.sequence_length, config.run.seed)
    tokens = samples.batch(2 * size, (steps - 2) * size, 0, 1, 1).tokens
    holders = {int(token): (tokens == token).any(1).nonzero().flatten().tolist() for token in tokens.unique()}
    token, (row,) = next((token, rows) for token, rows in holders.items() if len(rows) == 1)
    (path,) = checkpoint.steps(Path(config.run.dir) / checkpoint.FOLDER).values()
    content = checkpoint.read(path)
    weight = content.model["embed.weight"].clone()
    weight[token] = torch.nan
    checkpoint.write(path.parent, dataclasses.replace(content, model={**content.model, "embed.weight": weight}), keep=2)
    return 2 * size + row


@pytest.mark.parametrize("mesh", [MeshConfig(), MeshConfig(dp=2), MeshConfig(tp=2)], ids=["one", "dp2", "tp2"])
def test_a_bad_step_is_skipped_and_its_samples_written_down(
    mesh: MeshConfig, data: Path, tmp_path: Path, pool: Pool
) -> None:
    config = runs.run_config(data, tmp_path / "run", mesh, micro_batch=1)
    runs.run(dataclasses.replace(config, mesh=MeshConfig()), Launch(stop_after=2))
    sample = poison(config)
    config = with_policy(config, FaultsConfig(policy="skip"))
    records = pool.run(runs.run_through, mesh.world_size, config)[0]
    (found,) = [json.loads(line) for line in (tmp_path / "run" / FAULTS).read_text().splitlines()]
    step = sample // config.train.global_batch + 1
    ((first, past),) = found["samples"]
    assert (found["step"], found["loss"]) == (step, "nan")
    assert first <= sample < past == first + mesh.replicate * mesh.shard
    assert [r["step"] for r in records if r.get("train/skipped")] == [step]
    assert [r["step"] for r in records if "train/loss" in r] == [n for n in range(1, 7) if n != step]


def test_a_run_stops_after_too_many_in_a_row(data: Path, tmp_path: Path) -> None:
    config = runs.run_config(data, tmp_path / "run")
    runs.run(config, Launch(stop_after=2))
    (path,) = checkpoint.steps(tmp_path / "run" / checkpoint.FOLDER).values()
    content = checkpoint.read(path)
    bad = {**content.model, "norm.weight": torch.full_like(content.model["norm.weight"], torch.nan)}
    checkpoint.write(path.parent, dataclasses.replace(content, model=bad), keep=2)
    with pytest.raises(FloatingPointError, match="step 5 after 2 skipped in a row has loss nan"):
        runs.run(with_policy(config, FaultsConfig(policy="skip", most_skips=2)))
    assert len((tmp_path / "run" / FAULTS).read_text().splitlines()) == 3
