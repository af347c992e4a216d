"""What `weft check` and `weft train` refuse before any process starts, and a check that breaks down."""

from pathlib import Path
from typing import Any

import pytest

from configs.load import load
from configs.text import dump_yaml
from launch.cli import main
from parallel.testing import RankError
from tests.launch.test_cli import CONFIG, dataset, in_the_root, refused
from trainer.preflight import load_run
from trainer.resume import FOLDER
from trainer.runfolder import write_config

__all__ = ["in_the_root"]


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (RankError("rank 1 of 2:\nTraceback (most recent call last):\n  ...\nKeyError: 'x'\n"), "KeyError: 'x'"),
        (TimeoutError("ranks [1] of 2 did not answer"), "TimeoutError: ranks [1] of 2 did not answer"),
        (AssertionError(), "AssertionError: "),
        (ValueError("on one process the loss is nan"), "on one process the loss is nan"),
    ],
    ids=["rank", "timeout", "crash", "no_refusal"],
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


def test_a_check_looks_at_the_model_alone(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls: list[Any] = []

    def run(config: Any, *_: Any) -> None:
        calls.append(config)
        raise TimeoutError

    monkeypatch.setattr("parallel.check.run", run)
    model = dump_yaml({"model": load(CONFIG)["model"]})
    file = tmp_path / "model.yaml"
    for rest in ("", "mesh: {tp: 3}\ndata: {train: nowhere}\n", "train: {steps: 0, dtype: bfloat16}\n"):
        file.write_text(model + rest)
        assert main(["check", str(file), "--mesh", "tp=2"]) == 3
    capsys.readouterr()
    assert calls[0] == calls[1] == calls[2] and calls[0].d_model == 64

    said = refused(capsys, "check", str(file), "modle.d_model=32", "--mesh", "tp=2")
    assert said == (
        "modle: unknown key; did you mean model? the config takes model, run, data, train, optim, schedule, mesh, "
        "memory, engine, kernels"
    )
    said = refused(capsys, "check", str(file), "model.d_modle=32", "--mesh", "tp=2")
    assert said.startswith("model.d_modle: unknown key; did you mean d_model? ")
    file.write_text("mesh: {tp: 2}\n")
    said = refused(capsys, "check", str(file), "--mesh", "tp=2")
    assert said == f"{file}: model is missing, and nothing else is asked for; give a config that has one"
    assert len(calls) == 3


def test_a_check_refuses_a_type_that_cannot_hold_the_model(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [CONFIG, "model.residual={kind: reversible, grid_bits: 30}", "--mesh", "tp=2", "--dtype", "float32"]
    assert refused(capsys, "check", *arguments).startswith("grid_bits is 30 and the stream is torch.float32")


@pytest.mark.parametrize("mesh", ["", "tp=1", "pp=1,dp=1"])
def test_a_check_needs_several_ranks(capsys: pytest.CaptureFixture[str], mesh: str) -> None:
    sentence = f"--mesh '{mesh}' is one process, with nothing to compare; give a mesh such as dp=2"
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
        # The folder to prepare is never one that is there before.
        for place in ("/", ""):
            sentence = f"data.{name}: {place}nope.bin does not exist; make data with weft prepare data/nope SOURCE ... "
            assert said(f"data.{name}={place}nope") == sentence + "and give data/nope/train"
        sentence = f"data.{name}: {folder} is a folder; give the dataset in it, {folder}/{name}"
        assert said(f"data.{name}={folder}") == sentence
    assert said(f"data.tokenizer={gone}").startswith(f"data.tokenizer: {gone} does not exist; ")
    assert said("model.vocab_size=58") == (
        "model.vocab_size is 58 and the data's tokenizer has 60 pieces; use at least 60"
    )


def test_eval_refuses_before_any_process_starts(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launch.agent.work", lambda *_: pytest.fail("processes started"))
    run = str(tmp_path / "run")

    def said(*arguments: str) -> str:
        return refused(capsys, "eval", run, *arguments)

    assert said("--mesh", "fsdp=2") == f"{run} has no checkpoint; give the folder of a run that has saved one"
    assert said("--mesh", "fspd=2").startswith("mesh has no key 'fspd'; did you mean fsdp?")
    saved_run(Path(run), "model.vocab_size=512", "data.valid=nope/valid")
    assert said("--mesh", "tp=3").startswith("tp is 3, which does not divide the ")
    assert said("--mesh", "fsdp=2").startswith("data.valid: nope/valid.bin does not exist; ")
    assert said("--mesh", "fsdp=2", "--data", "nope/x").startswith("--data: nope/x.bin does not exist; ")
    saved_run(Path(run), "data.valid=null")
    assert said("--mesh", "fsdp=2") == (
        "the run has no data.valid; name text files to evaluate on, or data with --data PREFIX"
    )


def saved_run(folder: Path, *overrides: str) -> None:
    """A run's folder as it is seen before any weight is read."""
    (folder / FOLDER / "step-00000001").mkdir(parents=True, exist_ok=True)
    write_config(folder, load_run(CONFIG, overrides))


def test_eval_on_several_ranks_starts_as_many(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    called: list[Any] = []

    def work(*arguments: Any) -> int:
        called.extend(arguments)
        return 5

    monkeypatch.setattr("launch.agent.work", work)
    paths = dataset(tmp_path / "data")
    run = str(tmp_path / "run")
    saved_run(Path(run), *paths)
    assert main(["eval", run, "--mesh", "fsdp=2", "--json", "--data", f"{tmp_path}/data/train"]) == 5
    group, arguments = called
    assert group.nproc == 2
    data = f"--data={tmp_path}/data/train"
    assert arguments == ["-m", "launch.cli", "eval", run, "--mesh=fsdp=2", data, "--json"]


def test_the_module_refuses_what_the_command_refuses(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from trainer.train import main as module

    paths = dataset(tmp_path / "data")
    for wrong in (["mesh.tp=3"], ["model.d_model=62"], ["data.train=nope/x"], ["train.dtype=float16"], ["steps"]):
        sentence = refused(capsys, "train", CONFIG, *paths, *wrong)
        assert module([CONFIG, *paths, *wrong]) == 2
        assert capsys.readouterr() == ("", f"error: {sentence}\n")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["--nproc", "3"],
            "--nproc 3 makes 3 processes and the mesh tp=2 takes 2; leave --nproc out, or give a mesh of 3 processes",
        ),
        (
            ["--nodes", "2", "--nproc", "2"],
            "--nodes 2 x --nproc 2 makes 4 processes and the mesh tp=2 takes 2; leave --nproc out, or give a mesh "
            "of 4 processes",
        ),
        (
            ["--nodes", "3"],
            "--nodes 3 cannot share the 2 processes of the mesh tp=2; use a number that divides 2, or a mesh of a "
            "multiple of 3 processes",
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
