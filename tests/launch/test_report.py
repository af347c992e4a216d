"""The demonstration's figures: the held-out bytes are those that were evaluated, and xz packs the same."""

import json
import lzma
from pathlib import Path

import pytest

from launch import report
from tests.trainer.runs import prepare_data
from trainer.data.manifest import split_of


def test_held_out_texts_are_whole_files(tmp_path: Path) -> None:
    data = prepare_data(tmp_path)
    texts = report.held_out(data / "valid", data / "tokenizer.model")
    files = {file.read_bytes() for file in (tmp_path / "text").iterdir()}
    split = split_of(str(data / "valid"))
    assert split is not None and split["bytes"] == sum(map(len, texts)) > 0
    assert len(set(texts)) == split["documents"] and set(texts) < files


@pytest.mark.parametrize(("bits", "verdict"), [(0.5, "less"), (7.9, "more")])
def test_comparison(bits: float, verdict: str) -> None:
    texts = [b"warp and weft, " * 20, bytes(range(256)) * 2]
    xz = 8 * len(lzma.compress(b"".join(texts), preset=9)) / 812
    lines = report.comparison(bits, texts).splitlines()
    assert lines[0] == f"the model: {bits:.3f} bits per byte of 812 bytes in 2 files it has not seen"
    assert (
        lines[1] == f"xz -9:     {xz:.3f} bits per byte of the same; the model needs {abs(1 - bits / xz):.0%} {verdict}"
    )


def test_the_last_step_of_a_log_that_is_being_written(tmp_path: Path) -> None:
    assert report.last_step(tmp_path) == 0
    log = tmp_path / "metrics.jsonl"
    log.write_text('{"step": 3, "train/loss": 1.0}\n{"step": 4, "train')
    assert report.last_step(tmp_path) == 3


def test_the_curve_is_a_picture(tmp_path: Path) -> None:
    records = [{"step": step, "train/loss": 9 / step} for step in range(1, 9)] + [{"step": 8, "valid/loss": 1.2}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    report.curve(tmp_path, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
