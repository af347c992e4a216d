"""What `weft check` and `weft train` refuse before any process starts, and a check that breaks down."""

import os
from pathlib import Path
from typing import Any

import pytest

from launch.cli import main
from parallel.testing import RankError
from tests.launch.test_cli import CONFIG, dataset, in_the_root, refused

__all__ = ["in_the_root"]


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (RankError("rank 1 of 2:\nTraceback (most recent call last):\n  ...\nKeyError: 'x'\n"), "KeyError: 'x'"),
        (TimeoutError("ranks [1] of 2 did not answer"), "TimeoutError: ranks [1] of 2 did not answer"),
        (AssertionError(), "AssertionError: "),
    ],
    ids=["rank", "timeout", "crash"],
)
def test_a_check_that_breaks_down_is_no_verdict(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, error: Exception, sentence: str
) -> None:
    def run(*_: Any) -> None:
        raise error

    monkeypatch.setattr("parallel.check.run", run)
    assert main(["check", CONFIG, "--mesh", "tp=2"]) == 3
    assert capsys.readouterr() == ("", f"weft: check could not finish: {sentence}".rstrip() + "\n")
    monkeypatch.setenv("WEFT_TRACEBACK", "1")
    assert main(["check", CONFIG, "--mesh", "tp=2"]) == 3
    assert capsys.readouterr().err.startswith("Traceback")


@pytest.mark.parametrize("mesh", ["", "tp=1", "pp=1,dp=1"])
def test_a_check_needs_several_ranks(capsys: pytest.CaptureFixture[str], mesh: str) -> None:
    sentence = f"--mesh '{mesh}' is one process, with nothing to compare; give a mesh such as tp=2"
    assert refused(capsys, "check", CONFIG, "--mesh", mesh) == sentence


def test_a_check_needs_a_token(capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(capsys, "check", CONFIG, "--mesh", "tp=2", "--length", "0") == "--length is 0; it must be at least 1"


@pytest.mark.parametrize("mesh", [[], ["mesh.tp=2"]])
def test_train_refuses_before_any_process_starts(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mesh: list[str]
) -> None:
    monkeypatch.setattr(os, "execve", lambda *_: pytest.fail("torchrun started"))
    folder = tmp_path / "data"
    paths = dataset(folder)

    def said(*overrides: str) -> str:
        return refused(capsys, "train", CONFIG, *mesh, *paths, *overrides)

    gone = tmp_path / "gone"
    for name in ("train", "valid"):
        sentence = f"data.{name}: {gone}/x.bin does not exist; make it with weft prepare {gone} SOURCE ..."
        assert said(f"data.{name}={gone}/x") == sentence
        sentence = f"data.{name}: {folder} is a folder; give the dataset in it, {folder}/{name}"
        assert said(f"data.{name}={folder}") == sentence
    assert said(f"data.tokenizer={gone}").startswith(f"data.tokenizer: {gone} does not exist; ")
    assert said("train.dtype=bfloat16").endswith("needs float32 master weights that are not built yet; use float32")
    assert said("model.vocab_size=58") == (
        "model.vocab_size is 58 and the data's tokenizer has 60 pieces; use at least 60"
    )


def test_the_module_refuses_what_the_command_refuses(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from trainer.train import main as module

    paths = dataset(tmp_path / "data")
    for wrong in (["mesh.tp=3"], ["model.d_model=62"], ["data.train=nope/x"], ["train.dtype=bfloat16"], ["steps"]):
        sentence = refused(capsys, "train", CONFIG, *paths, *wrong)
        assert module([CONFIG, *paths, *wrong]) == 2
        assert capsys.readouterr() == ("", f"error: {sentence}\n")
