"""The demonstration runs to its end, and leaves what it says."""

import re
from pathlib import Path

import pytest

from launch import demo


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_quick(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert demo.main(["--quick", "--dir", str(tmp_path)]) == 0
    out = capfd.readouterr().out
    assert "kill -TERM" in out and re.search(r"resuming after step (\d+)", out)
    assert re.search(r"the model: [\d.]+ bits per byte of [\d,]+ bytes in \d+ files", out) and "xz -9: " in out
    assert (tmp_path / "run" / "loss.png").read_bytes().startswith(b"\x89PNG") and "tensorboard --logdir" in out
    assert "reloaded by transformers with the same logits" in out
    assert (tmp_path / "hf" / "modeling_weft.py").is_file()
    assert [path.name for path in sorted((tmp_path / "run" / "checkpoints").iterdir())][-1] == "step-00000100"


def test_a_failing_command_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "data").mkdir()
    assert demo.main(["--quick", "--dir", str(tmp_path)]) == 1
    assert "demo: `weft train" in capfd.readouterr().err
