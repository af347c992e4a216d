"""A plain run becomes one whose residual can be undone: losses before and after, and what it is good for then."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from launch.cli import main
from parallel.mesh import Mesh, MeshConfig
from parallel.testing import Pool
from tests.trainer import runs
from trainer import checkpoint, convert
from trainer.conversion import Request, plan
from trainer.loaded import load_whole


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.prepare_data(tmp_path_factory.mktemp("convert"))


@pytest.fixture(scope="module")
def source(data: Path) -> Path:
    """A run that has learned what its data have to teach."""
    folder = data.parent / "plain"
    config = runs.run_config(data, folder, steps=60, global_batch=8, micro_batch=8, save_every=0)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=str(data / "tokenizer.model")))
    runs.run(config)
    return folder


def said(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    # On a busy machine the other stream tells how far it is.
    assert main([str(argument) for argument in arguments]) == 0
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    assert main(["convert", *map(str, arguments)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    return err.removeprefix("weft: ").rstrip()


def files(folder: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("kind", ["midpoint_smoothed", "midpoint", "reversible"])
def test_distillation_brings_the_loss_back(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, source: Path, kind: str
) -> None:
    before, out = files(source), tmp_path / "out"
    words = ["--residual", kind, "--steps", 25, "model.residual.grid_bits=14", "memory.kind=reversible", "--json"]
    report = json.loads(said(capsys, "convert", source, out, *words))
    assert report["source"] < report["distilled"] < report["converted"]
    assert report["distilled"] < report["fitted"] < report["converted"] if kind == "midpoint" else not report["fitted"]
    # Most of what was lost comes back.
    assert report["distilled"] - report["source"] < 0.5 * (report["converted"] - report["source"])
    assert files(source) == before
    evaluated = [json.loads(said(capsys, "eval", folder, "--json"))["loss"] for folder in (source, out)]
    assert evaluated == pytest.approx([report["source"], report["distilled"]], rel=1e-12)
    assert said(capsys, "generate", out, "the warp", "--max-new-tokens", 3).startswith("the warp")

    # It trains on from there, in a folder of its own, and keeps little of the forward pass.
    main(["train", f"{out}/config.yaml", "train.steps=2", "train.eval_every=1"])
    assert f"starting from the weights of {out}/checkpoints/step-00000000" in capsys.readouterr().out
    config, _, path = load_whole(Path(f"{out}-trained"))
    assert path.name == "step-00000002" and config.memory.kind == "reversible"
    assert config.model.residual.kind == kind


def test_without_steps_it_converts_only(capsys: pytest.CaptureFixture[str], tmp_path: Path, source: Path) -> None:
    out = tmp_path / "out"
    lines = said(capsys, "convert", source, out, "--residual", "midpoint", "--steps", 0).splitlines()
    assert len(lines) == 3 and lines[0].startswith(f"{source}/checkpoints/step-00000060: held-out loss ")
    assert lines[1].startswith("converted to midpoint: held-out loss ") and lines[2] == f"saved {out}"
    plain, made = load_whole(source)[1].state_dict(), load_whole(out)[1].state_dict()
    assert plain.keys() == made.keys() and all(torch.equal(plain[name], made[name]) for name in plain)


def test_kernels_that_the_machine_lacks_are_said(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, source: Path
) -> None:
    words = ["--residual", "midpoint", "--steps", "0", "kernels={linear: float8}"]
    assert main(["convert", str(source), str(tmp_path / "out"), *words]) == 0
    warnings = [line for line in capsys.readouterr().err.splitlines() if "kernels.linear is float8" in line]
    assert len(warnings) == 2 and all(line.endswith(": auto is taken here") for line in warnings)


def test_a_distillation_that_did_harm_is_told_of(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, source: Path
) -> None:
    """And what it made is saved all the same."""
    out, words = tmp_path / "out", ("--residual", "midpoint", "--steps", "2", "--limit", "4", "--json")
    assert main(["convert", str(source), str(out), *words, "optim.lr=3"]) == 0
    report, err = capsys.readouterr()
    losses = json.loads(report)
    assert losses["distilled"] > losses["converted"] and (out / "config.yaml").exists()
    assert (
        f"weft: warning: the distillation left the model worse ({losses['distilled']:.4f}) than as converted ("
        f"{losses['converted']:.4f}): give more --steps than 2, or lower optim.lr, which is 3; --steps 0 converts alone"
    ) in err


def converted(source: Path, out: Path, mesh: MeshConfig, kind: str, estimate: int | None) -> convert.Report:
    """As a rank of a mesh does."""
    overrides = ("train.micro_batch=4", "train.dtype=float64", "memory.kind=reversible")
    request = Request(source, out, kind, 3, overrides, limit=5, fit=2, estimate=estimate)
    planned = plan(request, mesh, lambda _: None)
    return convert.convert(planned, Mesh(mesh), request, Console(quiet=True), print, print)


@pytest.mark.parametrize(("kind", "estimate"), [("midpoint", None), ("midpoint", 1), ("reversible", 2)])
@pytest.mark.parametrize("mesh", [MeshConfig(dp=2), MeshConfig(fsdp=2)], ids=str)
def test_ranks_equal_one_process(
    pool: Pool, tmp_path: Path, source: Path, mesh: MeshConfig, kind: str, estimate: int | None
) -> None:
    """In float64, up to the order of sums."""
    alone = converted(source, tmp_path / "alone", MeshConfig(), kind, estimate)
    together = pool.run(converted, 2, source, tmp_path / "out", mesh, kind, estimate)
    assert together[0] == together[1]
    one, two = (dataclasses.asdict(report) for report in (alone, together[0]))
    assert two == {name: value and pytest.approx(value, rel=1e-10) for name, value in one.items()}
    one, two = (load_whole(tmp_path / name)[1].state_dict() for name in ("alone", "out"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("moment", ["distill", "publish", "sync_file"])
def test_what_is_broken_off_leaves_nothing(
    tmp_path: Path, source: Path, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    seen: list[list[str]] = []

    def broken(*_: Any, **__: Any) -> None:
        seen.append([path.name for path in tmp_path.iterdir()])
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint if moment == "publish" else convert, moment, broken)
    assert main(["convert", str(source), str(out), "--residual", "midpoint", "--steps", "1", "--limit", "1"]) == 130
    # Until then nothing has the name: what is being written is hidden, and found by no command.
    assert "out" not in seen[0] and all(name.startswith(".out.") for name in seen[0])
    assert list(tmp_path.iterdir()) == []


def test_refusals(capsys: pytest.CaptureFixture[str], tmp_path: Path, source: Path) -> None:
    out = tmp_path / "out"
    path = source / "checkpoints" / "step-00000060"

    def said_of(kind: str, *words: Any) -> str:
        return refused(capsys, source, out, "--residual", kind, *words)

    assert said_of("ladder") == (
        "residual ladder cannot be undone, and models are converted to ones that can; give one of those, such as "
        "midpoint, midpoint_smoothed, multi_split or reversible"
    )
    assert said_of("plain").startswith("residual plain cannot be undone")
    assert said_of("reversibel").startswith("unknown residual kind 'reversibel'; did you mean 'reversible'?")
    assert said_of("midpoint", "model.d_model=32") == (
        f"model.d_model is 32, and 16 in {path}; a conversion changes model.residual alone, leave model.d_model out"
    )
    assert said_of("midpoint", "model.residual.kind=reversible").startswith("model.residual.kind: is reversible, and ")
    assert said_of("midpoint", "model.shortcut.kind=laurel").startswith("model: shortcut laurel acts on one identity")
    assert said_of("reversible", "model.residual.grid_bits=30").startswith("model.residual: grid_bits is 30 and ")
    assert said_of("midpoint", "--mesh", "tp=2") == (
        "the mesh tp=2 has tp=2, and a model is converted on data ranks alone; leave tp out, or use dp, fsdp or hsdp "
        "instead"
    )
    assert said_of("midpoint", "--mesh", "dp=3").startswith("train.global_batch is 8, not a multiple of 3 data ranks")
    assert said_of("midpoint", "data.valid=null") == (
        f"the run of {path} has no data.valid, on which the loss is measured before and after; give data.valid=PREFIX"
    )
    assert said_of("midpoint", f"data.train={tmp_path}/x").startswith(f"data.train: {tmp_path}/x.bin does not exist")
    assert said_of("midpoint", "--steps", "-1") == "steps is -1; it must be at least 0"
    assert said_of("midpoint", "--limit", "0") == "limit is 0; it must be at least 1"
    assert said_of("midpoint", "--estimate", "0") == "estimate is 0; it must be at least 1"
    assert said_of("midpoint_smoothed", "--fit", "5") == (
        "--fit is 5, and layers with residual midpoint_smoothed cannot each be fitted to a plain layer's step; leave "
        "it out, or take a residual with which they can, such as midpoint or reversible"
    )
    assert said_of("reversible", "--fit", "0", "--estimate", "1") == (
        "--estimate is 1, and with --fit 0 no layer is fitted to it; leave it out, or give a --fit of at least 1"
    )
    assert not out.exists()

    assert refused(capsys, tmp_path, out, "--residual", "midpoint") == (
        f"{tmp_path} has no checkpoint; give the folder of a run that has saved one"
    )
    assert refused(capsys, source, source, "--residual", "midpoint") == (
        f"{source} exists and is not an empty folder; convert to a new one, or remove it"
    )
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    assert refused(capsys, folder, out, "--residual", "midpoint").startswith(f"{folder} is a Hugging Face folder; ")


def test_only_plain_models_are_converted(capsys: pytest.CaptureFixture[str], tmp_path: Path, source: Path) -> None:
    content = checkpoint.read(source / "checkpoints" / "step-00000060")
    other = {**content.config, "model": {**content.config["model"], "residual": {"kind": "parallel"}}}
    path = checkpoint.write(tmp_path / "run" / "checkpoints", dataclasses.replace(content, config=other), 1)
    assert refused(capsys, tmp_path / "run", tmp_path / "out", "--residual", "midpoint") == (
        f"the model of {path} has residual parallel, and only one with residual plain can be converted; give the "
        "checkpoint of such a model"
    )


def test_a_distillation_that_breaks_down_writes_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, source: Path
) -> None:
    sentence = refused_late(capsys, source, tmp_path / "out", "--residual", "midpoint", "--steps", 4, "optim.lr=1e30")
    assert sentence.startswith("step ") and sentence.endswith("nothing was written; use a smaller optim.lr")
    assert list(tmp_path.iterdir()) == []


def refused_late(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    assert main(["convert", *map(str, arguments), "--limit", "1"]) == 2
    return capsys.readouterr().err.removeprefix("weft: ").rstrip()
