"""What `weft check` and `weft train` refuse before any process starts, and a check that breaks down."""

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
    monkeypatch.setattr("launch.agent.train", lambda *_: pytest.fail("processes started"))
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


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["--nproc", "3"],
            "--nproc 3 makes 3 processes and the mesh tp=2 takes 2; leave --nproc out, or change the mesh, "
            "such as mesh.fsdp=3",
        ),
        (
            ["--nodes", "2", "--nproc", "2"],
            "--nodes 2 x --nproc 2 makes 4 processes and the mesh tp=2 takes 2; leave --nproc out, or change the mesh, "
            "such as mesh.fsdp=4",
        ),
        (
            ["--nodes", "3"],
            "--nodes 3 cannot share the 2 processes of the mesh tp=2; use a number that divides 2, or another mesh, "
            "such as mesh.fsdp=3",
        ),
        (
            ["--nodes", "2"],
            "--nodes 2 needs --slurm, which starts them all, or --rdzv-endpoint HOST:PORT of the first machine, "
            "with the same command on each",
        ),
        (
            ["--nodes", "2", "--rdzv-endpoint", "node1"],
            "--rdzv-endpoint is 'node1'; write HOST:PORT, such as node1:29500",
        ),
        (["--nodes", "0"], "--nodes is 0; it must be at least 1"),
        (["--nproc", "0"], "--nproc is 0; it must be at least 1"),
        (["--max-restarts", "-1"], "--max-restarts is -1; it must be at least 0"),
        (["--shutdown-timeout", "-1"], "--shutdown-timeout is -1.0; it must be at least 0"),
    ],
)
def test_processes_that_do_not_make_up_the_mesh(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str], sentence: str
) -> None:
    paths = dataset(tmp_path / "data")
    assert refused(capsys, "launch", CONFIG, "mesh.tp=2", *paths, *arguments) == sentence
