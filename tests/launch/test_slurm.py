"""The job of a run: its script, the copy of the code that it runs, and what is refused."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from launch.local import ROOT
from launch.slurm import seconds
from tests.launch.test_cli import CONFIG, dataset, in_the_root, printed, refused

__all__ = ["in_the_root"]


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    """For a run on two machines in a folder whose name has a blank."""
    changes = [f"run.dir={tmp_path}/a run", "mesh.fsdp=4", "train.micro_batch=2", *dataset(tmp_path / "data")]
    return ["launch", CONFIG, *changes, "--slurm", "--nodes", "2"]


def directives(script: str) -> dict[str, str]:
    """The options that sbatch would read."""
    lines = [line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH ")]
    return {name: value for name, _, value in (shlex.split(line)[0].partition("=") for line in lines)}


def test_the_script(capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str]) -> None:
    more = ["--time", "1:00:00", "--partition", "gpu", "--sbatch", "mem=64G", "--sbatch", "output=x.out", "--dry-run"]
    script = printed(capsys, *arguments, *more)
    folder = tmp_path / "a run" / "launch-1"
    assert directives(script) == {
        "job-name": "a run",
        "nodes": "2",
        "ntasks-per-node": "1",
        "time": "1:00:00",
        "partition": "gpu",
        "output": "x.out",
        "open-mode": "append",
        "signal": "B:USR1@300",
        "requeue": "",
        "exclusive": "",
        "mem": "64G",
    }
    assert f"cd {ROOT} || exit 1\nexport PYTHONPATH='{folder}/code'\"${{PYTHONPATH:+:$PYTHONPATH}}\"\n" in script
    assert f"launch '{folder}/config.yaml' \\\n" in script
    assert '--nodes="$SLURM_JOB_NUM_NODES" --nproc=2 --max-restarts=0 --shutdown-timeout=300 \\\n' in script
    assert f"last='{tmp_path}/a run/checkpoints/step-00000050'\n" in script
    assert not (tmp_path / "a run").exists()
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0


def test_options_by_name(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    named = ["--gpus-per-node", "2", "--cpus-per-node", "16", "--account", "me", "--qos", "low", "--job-name", "x"]
    more = ["--save-time", "60", "--stop-after", "7", "--max-restarts", "3", "--dry-run"]
    script = printed(capsys, *arguments, *named, *more)
    found = directives(script)
    assert (found["gpus-per-node"], found["cpus-per-task"], found["signal"]) == ("2", "16", "B:USR1@60")
    assert (found["account"], found["qos"], found["job-name"]) == ("me", "low", "x") and "exclusive" not in found
    assert "--nproc=2 --max-restarts=3 --shutdown-timeout=60 --stop-after=7" in script
    assert "/checkpoints/step-00000007'\n" in script


SBATCH = """#!/bin/sh
cp "$2" {folder}/received
[ -z "$REFUSE" ] || {{ echo "sbatch: error: $REFUSE" >&2; exit 1; }}
echo "4242;cluster"
"""


@pytest.fixture
def sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stands in for Slurm's; the script that it was given."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "sbatch").write_text(SBATCH.format(folder=folder))
    (folder / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder / "received"


def test_the_copy_is_what_runs(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    arguments: list[str],
    sbatch: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plugins = tmp_path / "my plugins"
    (plugins / "scaling").mkdir(parents=True)
    (plugins / "scaling" / "mine.py").write_text("")
    (plugins / "big.bin").write_text("")
    monkeypatch.setenv("WEFT_PLUGINS", str(plugins))
    said = printed(capsys, *arguments, "train.steps=9")
    folder = tmp_path / "a run" / "launch-1"
    assert said.startswith("submitted job 4242; ") and str(folder) in said
    script = sbatch.read_text()
    assert script == (folder / "job.sh").read_text()
    assert "steps: 9\n" in (folder / "config.yaml").read_text()
    assert sorted(path.name for path in (folder / "code" / "plugins" / "0").rglob("*")) == ["mine.py", "scaling"]
    assert printed(capsys, "config", "show", str(folder / "config.yaml")) == (folder / "config.yaml").read_text()

    exports = "\n".join(line for line in script.splitlines() if line.startswith("export "))
    ask = "import os, launch.local as l, trainer.train as t; print(l.ROOT, t.__file__, os.environ['WEFT_PLUGINS'])"
    bash = f"{exports}\n{shlex.quote(sys.executable)} -c {shlex.quote(ask)}"
    done = subprocess.run(["bash", "-c", bash], cwd=ROOT, capture_output=True, text=True, check=True)
    code = folder / "code"
    assert done.stdout == f"{code} {code}/trainer/train.py {code}/plugins/0\n"

    printed(capsys, *arguments)
    assert (tmp_path / "a run" / "launch-2" / "job.sh").is_file()


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--fresh"], "--fresh would start anew whenever the job returns from the queue; use another run.dir"),
        (
            ["--rdzv-endpoint", "a:1"],
            "--rdzv-endpoint is for machines that are started by hand; leave it out with --slurm",
        ),
        (["--save-time", "0"], "--save-time is 0; Slurm takes 1 to 65535 seconds"),
        (
            ["--time", "5"],
            "--time 5 is 300 s, and the run is told to save 300 s before its end; "
            "give more --time, or less --save-time",
        ),
        (
            ["--time", "soon"],
            "--time is 'soon'; write minutes, HOURS:MINUTES:SECONDS or DAYS-HOURS, such as 24:00:00",
        ),
        (["--sbatch", "Mem"], "--sbatch is 'Mem'; write an option of sbatch, such as --sbatch mem=64G"),
        (
            ["--sbatch", "signal=TERM@9"],
            "--sbatch signal=TERM@9 would break how the job saves and resumes; leave signal out",
        ),
        (
            ["--gpus-per-node", "8"],
            "--nodes 2 x --nproc 8 makes 16 processes and the mesh fsdp=4 takes 4; leave --nproc out, or give a "
            "mesh of 16 processes",
        ),
    ],
)
def test_refusals(capsys: pytest.CaptureFixture[str], arguments: list[str], more: list[str], sentence: str) -> None:
    assert refused(capsys, *arguments, "--dry-run", *more) == sentence


def test_without_slurm(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    sentence = "sbatch is not on this machine; log in to one of the cluster, or look at it with --dry-run"
    assert refused(capsys, *arguments) == sentence
    assert not (tmp_path / "a run").exists()
    assert refused(capsys, "launch", CONFIG, "--time", "5") == (
        "--time is for a Slurm job; add --slurm, or leave it out"
    )


def test_what_sbatch_refuses(
    capsys: pytest.CaptureFixture[str], arguments: list[str], sbatch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REFUSE", "Invalid qos")
    sentence = refused(capsys, *arguments)
    assert re.fullmatch(
        r"sbatch refused the job: sbatch: error: Invalid qos; its script is /.*/a run/launch-1/job.sh", sentence
    )


@pytest.mark.parametrize(
    ("limit", "expected"),
    [("5", 300), ("1:30", 90), ("2:00:00", 7200), ("1-2", 93600), ("1-2:03", 93780), ("1-2:03:04", 93784)],
)
def test_time_limits(limit: str, expected: int) -> None:
    assert seconds(limit) == expected
