"""The demonstration runs to its end, and leaves what it says."""

from pathlib import Path

import pytest

from launch import demo


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_quick(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert demo.main(["--quick", "--dir", str(tmp_path)]) == 0
    out = capfd.readouterr().out
    assert "to step 6" in out and "resuming after step 6" in out
    assert "bits per byte" in out and "reloaded by transformers with the same logits" in out
    assert (tmp_path / "hf" / "modeling_weft.py").is_file()
    assert [path.name for path in sorted((tmp_path / "run" / "checkpoints").iterdir())] == [
        "step-00000009",
        "step-00000012",
    ]


def test_a_failing_command_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "data").mkdir()
    assert demo.main(["--quick", "--dir", str(tmp_path)]) == 1
    assert "demo: `weft train" in capfd.readouterr().err
