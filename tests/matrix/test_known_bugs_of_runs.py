"""Bugs of whole runs that rivals shipped, planted: the tests of this repository that look for them fail."""

import contextlib
import dataclasses
import math
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from models.context import LayerContext
from models.params import Normal
from parallel.mesh import Mesh, MeshConfig
from parallel.testing import Pool, RankError
from tests.models import test_cost, test_scaling
from tests.trainer import runs, test_checkpoint, test_data, test_run, test_signals
from trainer import checkpoint, loop, resume
from trainer.config import RunConfig
from trainer.data.training import TrainingData
from trainer.faults import Faults, FaultsConfig
from trainer.signals import Stop

# Each is a run or more, of code that the everyday tests hold by themselves.
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.prepare_data(tmp_path_factory.mktemp("data"))


@contextlib.contextmanager
def seen() -> Iterator[None]:
    """A test within fails: one of its assertions, or an error that it waits for in vain."""
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        yield


def test_depth_scaled_initialisation_never_applied() -> None:
    """OLMo-core."""
    test_scaling.test_output_matrices_shrink_with_depth()
    with mock.patch.object(LayerContext, "output_init", Normal(0.02)), seen():
        test_scaling.test_output_matrices_shrink_with_depth()


def test_flops_off_by_two() -> None:
    """OLMo-core: and so the MFU."""
    honest = test_cost.cost

    def broken(*args: Any) -> Any:
        found = honest(*args)
        return dataclasses.replace(found, flops_per_token=2 * found.flops_per_token)

    test_cost.test_a_llama_by_hand()
    with mock.patch.object(test_cost, "cost", broken), seen():
        test_cost.test_a_llama_by_hand()


def skipping(config: RunConfig, alone: bool) -> None:
    """A run that takes step 3 for a bad one, and leaves it out on all ranks, or on rank 0 alone."""
    mesh, honest = Mesh(config.mesh), Faults.passed

    def passed(self: Faults, step: int, loss: float, *rest: Any) -> bool:
        good = honest(self, step, math.nan if step == 3 else loss, *rest)
        return good or (alone and not mesh.is_main)

    with mock.patch.object(Faults, "passed", passed):
        runs.run(config, None, mesh)


def test_rank_0_alone_decides_to_skip(data: Path, tmp_path: Path, pool: Pool) -> None:
    """WeatherGenerator #2724."""
    config = runs.run_config(data, tmp_path / "together", MeshConfig(dp=2), check_replicas=1, micro_batch=1)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, faults=FaultsConfig(policy="skip")))
    pool.run(skipping, 2, config, False)
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, dir=str(tmp_path / "alone")))
    with pytest.raises(RankError, match=r"differs between ranks 0 and 1"):
        pool.run(skipping, 2, config, True)


def test_resume_forgets_the_optimiser(data: Path, tmp_path: Path) -> None:
    """Megatron-LM #1842, DeepSpeed #6691."""
    whole, parts, broken = (runs.run_config(data, tmp_path / name) for name in ("whole", "parts", "broken"))
    expected = runs.run_through(whole)
    assert runs.run_interrupted(parts, 3) == expected
    load = resume.load
    with mock.patch.object(resume, "load", lambda path, engine, optimizer: load(path, engine)):
        assert runs.run_interrupted(broken, 3) != expected


def test_samples_depend_on_the_number_of_ranks(data: Path, tmp_path: Path) -> None:
    """torchtitan #816, Megatron-Bridge #5637: some come twice, others never."""
    honest = TrainingData.batch
    (tmp_path / "out").symlink_to(data)

    def broken(self: TrainingData, start: int, count: int, rank: int, size: int, rows: int) -> Any:
        return honest(self, start - start % size, count, 0, size, rows)

    test_data.test_ranks_share_one_order(tmp_path, 2, 1)
    with mock.patch.object(TrainingData, "batch", broken), seen():
        test_data.test_ranks_share_one_order(tmp_path, 2, 1)


def test_old_checkpoints_go_before_the_new_one_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchtitan #909, #930."""
    honest = checkpoint.publish

    def broken(staging: Path, path: Path) -> None:
        for older in checkpoint.steps(path.parent).values():
            shutil.rmtree(older)
        honest(staging, path)

    test_checkpoint.test_a_crash_while_saving_loses_nothing(tmp_path / "honest", monkeypatch, "rename")
    with mock.patch.object(checkpoint, "publish", broken), seen():
        test_checkpoint.test_a_crash_while_saving_loses_nothing(tmp_path / "broken", monkeypatch, "rename")


def test_a_run_of_nan_goes_on_and_prunes(data: Path, tmp_path: Path) -> None:
    """KempnerForge #102."""
    test_run.test_not_finite_stops_before_the_weights_change(data, tmp_path / "honest")
    with mock.patch.object(Faults, "passed", lambda self, *args: True), seen():
        test_run.test_not_finite_stops_before_the_weights_change(data, tmp_path / "broken")


def test_resume_starts_anew_in_silence(data: Path, tmp_path: Path) -> None:
    """verl #7952, maxtext #5260."""
    test_run.test_logs_without_a_checkpoint_are_an_error_unless_told(data, tmp_path / "honest")
    with mock.patch.object(resume, "resume", lambda *args: None), mock.patch.object(loop, "resume", lambda *args: None):
        with seen():
            test_run.test_logs_without_a_checkpoint_are_an_error_unless_told(data, tmp_path / "broken")


@pytest.mark.parametrize("phase", ["validation", "saving"])
def test_a_signal_is_not_honoured(data: Path, tmp_path: Path, phase: str) -> None:
    """goodfire #741, Automodel #3007."""
    test_signals.test_a_signal_in_any_phase(data, tmp_path / "honest", phase, signal.SIGTERM)
    with mock.patch.object(Stop, "_note", lambda self, number, frame: None), seen():
        test_signals.test_a_signal_in_any_phase(data, tmp_path / "broken", phase, signal.SIGTERM)
