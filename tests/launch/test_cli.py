"""The command line: exit codes, one sentence for users, and what each command hands on."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launch.cli import find_commands, main
from launch.command import Command
from launch.group import Group
from launch.local import ROOT, environment
from models.hf.formats import SelfContained
from trainer.data.indexed import token_dtype, write_index
from trainer.data.manifest import MANIFEST

CONFIG = "configs/debug_attention.yaml"
SMALL = ["model.d_model=32", "data.sequence_length=16", "train.global_batch=2", "train.micro_batch=1", "train.steps=2"]


@pytest.fixture(autouse=True)
def in_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for name in ("WEFT_TRACEBACK", "WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one sentence that the command line ends in."""
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"weft: [^\n]+\n", err), err
    return err.removeprefix("weft: ").rstrip()


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    code = main(arguments)
    out, err = capsys.readouterr()
    assert (code, err) == (0, "")
    return out


ALL = (
    "bench, check, ckpt, config, convert, coord-check, data, eval, export, generate, import, launch, plan, plugins, "
    "prepare, train"
)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], f"no command given; the commands are {ALL}; see weft --help"),
        (["trian"], f"unknown command 'weft trian'; did you mean train? the commands are {ALL}"),
        (["config"], "no command given; the commands are show, validate, schema; see weft config --help"),
        (
            ["config", "shw"],
            "unknown command 'weft config shw'; did you mean show? the commands are show, validate, schema",
        ),
        (["train"], "the following arguments are required: CONFIG; see weft train --help"),
        (["train", CONFIG, "--frehs"], "unrecognized arguments: --frehs; did you mean --fresh? see weft train --help"),
        (
            ["train", CONFIG, "--stop-after=x"],
            "argument --stop-after: invalid int value: 'x'; see weft train --help",
        ),
        (["train", "nope.yaml"], "nope.yaml does not exist; give the path of a YAML file"),
        (
            ["config", "show", "configs/debug_atention.yaml"],
            "configs/debug_atention.yaml does not exist; did you mean debug_attention.yaml?",
        ),
        (
            ["train", CONFIG, "train.stesp=3"],
            "train.stesp: unknown key; did you mean steps? train takes steps, global_batch, micro_batch, log_every, "
            "eval_every, eval_batches, save_every, keep_checkpoints, keep_every, dtype, compile, faults, profile, "
            "check_replicas, timeout",
        ),
        (
            ["train", CONFIG, "steps"],
            "'steps' is no override; write a dotted key and a value, such as train.steps=100",
        ),
        (
            ["config", "show", CONFIG, "model.d_model=62"],
            "model.layers.A: d_model 62 is not a multiple of num_heads 4; give head_dim, or change one",
        ),
        (
            ["config", "show", CONFIG, "model.values={kind: value_embedding}"],
            "model.values: tables is 3: each serves two layers, and there are 4; use at most 2, or 6 layers",
        ),
        (
            ["config", "show", CONFIG, "model.residual={kind: reversible, grid_bits: 30}"],
            "model.residual: grid_bits is 30 and the stream is torch.float32, which has 24 binary digits; "
            "use fewer bits, a stream of more digits, or grid_bits null",
        ),
        (
            ["config", "show", CONFIG, "model.layers.A.ffn.hidden=100000000000000000"],
            "model.layers.A: parameter 'weight' of shape 100000000000000000 x 64 is too large, "
            "a tensor holds fewer than 2**60 elements; use smaller sizes",
        ),
        (
            ["check", CONFIG, "--mesh", "tpp=2"],
            "mesh has no key 'tpp'; did you mean tp? the keys are dp, fsdp, hsdp, tp, cp, context, ep, etp, ep_local, "
            "ep_chunks, pp, schedule, stages, reshard, overlap",
        ),
        (
            ["plugins", "mxer"],
            "there is no slot 'mxer'; did you mean mixer? "
            "the slots are mixer, attention_gate, router, ffn, matrix, norm, residual, values, shortcut, scaling, "
            "depth, controller, task, packing, optim, sparsity, schedule, memory, engine",
        ),
        (["eval", "nope"], "nope has no checkpoint; give the folder of a run that has saved one"),
        (["export", "nope", "out"], "nope has no checkpoint; give the folder of a run that has saved one"),
        (["generate", "nope", "Hi"], "nope has no checkpoint; give the folder of a run that has saved one"),
    ],
)
def test_refusals(capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str) -> None:
    assert refused(capsys, *arguments) == sentence


def test_a_mesh_that_cannot_hold_the_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert "tp is 3, which does not divide" in refused(capsys, "config", "show", CONFIG, "mesh.tp=3")
    assert "ep is 2" in refused(capsys, "config", "show", CONFIG, "mesh.ep=2", "mesh.dp=2")
    assert "stages" in refused(capsys, "config", "show", CONFIG, "mesh.pp=8")


def test_traceback_on_request(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEFT_TRACEBACK", "1")
    assert main(["config", "show", "nope.yaml"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("Traceback") and err.endswith(
        "weft: nope.yaml does not exist; give the path of a YAML file\n"
    )


def test_other_ranks_say_who_they_are(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    assert main(["config", "show", "nope.yaml"]) == 2
    assert capsys.readouterr().err.startswith("weft (rank 3): nope.yaml")


def test_many_lines_become_one(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise ValueError("one\n   two")

    monkeypatch.setattr("launch.runs.load_run", fail)
    assert refused(capsys, "config", "show", CONFIG) == "one two"


def test_bugs_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("launch.runs.load_run", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["config", "show", CONFIG])


def test_help_names_all_commands_and_loads_nothing_heavy() -> None:
    script = (
        "import sys; from launch.cli import main; code = main(['--help']); "
        "assert not {'torch', 'yaml', 'pydantic', 'transformers'} & set(sys.modules); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert set(re.findall(r"^  ([\w-]+)", done.stdout, re.MULTILINE)) == set(find_commands())


def test_every_command_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    for name, command in find_commands().items():
        parts = {(name,): command} if isinstance(command, Command) else {(name, k): c for k, c in command.items()}
        for path in parts:
            with pytest.raises(SystemExit) as caught:
                main([*path, "--help"])
            assert caught.value.code == 0
            assert capsys.readouterr().out.startswith(f"usage: weft {' '.join(path)} ")


def dataset(folder: Path, vocab_size: int = 60) -> list[str]:
    """The overrides for two tokens and a manifest; a tokenizer would be read."""
    folder.mkdir()
    for name in ("train", "valid"):
        tokens = np.array([1, 0], dtype=token_dtype(vocab_size))
        (folder / f"{name}.bin").write_bytes(tokens.tobytes())
        write_index(folder / f"{name}.idx", tokens.dtype, 1, [np.array([2], dtype=np.int32)])
    manifest = {"tokenizer": {"vocab_size": vocab_size, "sha256": "0"}}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return [f"data.train={folder}/train", f"data.valid={folder}/valid", "data.tokenizer=null"]


@pytest.mark.parametrize("command", ["train", "launch"])
def test_several_ranks_are_started_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: str) -> None:
    called: list[Any] = []

    def start(group: Group, arguments: list[str], _: object) -> int:
        called.extend([group, arguments])
        return 7

    monkeypatch.setattr("launch.agent.train", start)
    paths = dataset(tmp_path / "data")
    assert main([command, CONFIG, "mesh.tp=2", *paths, "--stop-after", "3", "--fresh"]) == 7
    group, arguments = called
    assert (group.nproc, group.nodes, group.max_restarts) == (2, 1, 0)
    words = ["train", CONFIG, "mesh.tp=2", *paths, "--stop-after=3", "--fresh"]
    assert arguments == ["-m", "launch.cli", *words]


def test_the_environment_keeps_what_was_there() -> None:
    assert environment({"PYTHONPATH": "/a", "B": "1"})["PYTHONPATH"] == f"{ROOT}{os.pathsep}/a"
    assert environment({"B": "1"}) == {"B": "1", "PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1"}
    assert environment({"PYTHONPATH": str(ROOT)})["PYTHONPATH"] == str(ROOT)


def test_processes_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)))
    threads = {n: environment({}, n).get("OMP_NUM_THREADS") for n in (1, 4, 5, 24)}
    assert threads == {1: None, 4: "3", 5: "2", 24: "1"}
    assert environment({"OMP_NUM_THREADS": "9"}, 4)["OMP_NUM_THREADS"] == "9"


def test_from_text_to_text(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """prepare, train, eval, generate and export hand on to one another."""
    data, run = tmp_path / "data", tmp_path / "run"
    said = printed(
        capsys, "prepare", str(data), "configs", "--suffix", ".yaml", *("--vocab-size=400", "--valid-bytes=2000")
    )
    assert re.match(rf"{re.escape(str(data))}/train: \d+ documents, [\d,]+ tokens\n", said)
    paths = [f"data.train={data}/train", f"data.valid={data}/valid", f"data.tokenizer={data}/tokenizer.model"]
    assert main(["train", CONFIG, f"run.dir={run}", *paths, *SMALL]) == 0
    capsys.readouterr()
    assert set(json.loads(printed(capsys, "eval", str(run), "--json"))) >= {"loss", "perplexity", "bits_per_byte"}
    assert printed(capsys, "generate", f"{run}/config.yaml", "base: ", "", "--max-new-tokens", "3").startswith("base: ")

    exported: list[Any] = []

    def pretend(*arguments: Any) -> SelfContained:
        exported.extend(arguments)
        return SelfContained()

    monkeypatch.setattr("models.hf.export.export", pretend)
    assert "step-00000002" in printed(capsys, "export", str(run), str(tmp_path / "out"))
    config, weights, out, options = exported
    assert config.d_model == 32 and "embed.weight" in weights and out == tmp_path / "out"
    assert options.tokenizer == f"{data}/tokenizer.model" and options.max_length == 16
