"""What is said where a machine computes faster in another type than the run's."""

from pathlib import Path

import pytest
import torch

from tests.trainer.runs import prepare_data, run, run_config
from trainer import peak, step

FLOPS = {torch.float32: 300e9, torch.bfloat16: 150e9}


@pytest.fixture
def without_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor that multiplies bfloat16 at half of float32's speed."""
    for module in (peak, step):
        monkeypatch.setattr(module, "matmul_peak", lambda device, dtype: FLOPS[dtype])


@pytest.mark.usefixtures("without_units")
def test_said_of_bfloat16_that_is_slower_than_float32() -> None:
    said = peak.faster_in_float32("cpu", torch.bfloat16, FLOPS[torch.bfloat16])
    assert said is not None and "2.0 times as fast in float32" in said and "train.dtype=float32" in said


@pytest.mark.usefixtures("without_units")
@pytest.mark.parametrize(
    ("device", "dtype", "reached"),
    [
        pytest.param("cpu", torch.bfloat16, FLOPS[torch.float32] / 1.2, id="within noise"),
        pytest.param("cpu", torch.bfloat16, 4 * FLOPS[torch.float32], id="units for bfloat16"),
        pytest.param("cpu", torch.float32, FLOPS[torch.float32], id="float32"),
        pytest.param("cuda", torch.bfloat16, FLOPS[torch.bfloat16], id="gpu"),
    ],
)
def test_not_said(device: str, dtype: torch.dtype, reached: float) -> None:
    assert peak.faster_in_float32(device, dtype, reached) is None


@pytest.mark.usefixtures("without_units")
def test_a_run_in_bfloat16_says_it(tmp_path: Path) -> None:
    data = prepare_data(tmp_path)
    for dtype in FLOPS:
        _, text = run(run_config(data, tmp_path / str(dtype), steps=1, dtype=str(dtype).removeprefix("torch.")))
        assert ("train.dtype=float32" in text) == (dtype == torch.bfloat16)
