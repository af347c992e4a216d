"""A run on a real Slurm of two nodes: submitted, preempted by the signal, requeued, resumed, finished.

The packages are installed if that is possible, as on a CI machine, and the tests are skipped with the reason if not.
"""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from configs.structure import to_plain
from configs.text import dump_yaml
from launch.local import ROOT, environment
from parallel.mesh import MeshConfig
from tests.launch import cluster
from tests.trainer.runs import prepare_data, records, run_config
from trainer.config import RunConfig

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]
STEPS = 100


@pytest.fixture(scope="module")
def slurm() -> Iterator[cluster.Cluster]:
    if reason := cluster.install():
        pytest.skip(reason)
    with cluster.cluster() as made:
        yield made


def submit(slurm: cluster.Cluster, folder: Path, *options: str) -> tuple[RunConfig, str]:
    """A run on both nodes, in a folder whose name has a blank; returns its config and the job's id."""
    config = run_config(prepare_data(folder), folder / "a run", MeshConfig(fsdp=2), steps=STEPS, save_every=0)
    file = folder / "config.yaml"
    file.write_text(dump_yaml(to_plain(config)))
    command = [sys.executable, "-m", "launch.cli", "launch", str(file), "--slurm", "--nodes", "2", *options]
    shell = {**environment(slurm.environment), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, env=shell, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return config, done.stdout.split()[2].rstrip(";")


def until(condition: Callable[[], bool], slurm: cluster.Cluster, number: str, folder: Path, within: float) -> None:
    end = time.monotonic() + within
    while not condition():
        state = slurm.job(number)["JobState"]
        if time.monotonic() > end or state in ("FAILED", "CANCELLED", "NODE_FAIL", "TIMEOUT"):
            output = folder / "a run" / "launch-1" / f"{number}.out"
            said = output.read_text() if output.exists() else "nothing"
            raise AssertionError(f"job {number} is {state}; it said\n{said}\n{slurm.logs()}")
        time.sleep(0.1)


def finished(slurm: cluster.Cluster, config: RunConfig, number: str, folder: Path) -> None:
    """The run was stopped, resumed and finished, and no step was lost or taken twice."""
    until(lambda: slurm.job(number)["JobState"] == "COMPLETED", slurm, number, folder, within=300)
    assert slurm.job(number)["Restarts"] == "1"
    said = (folder / "a run" / "launch-1" / f"{number}.out").read_text()
    assert "starting: " in said and "resuming after step " in said and "Traceback" not in said
    assert [record["step"] for record in records(config) if "train/loss" in record] == list(range(1, STEPS + 1))
    assert (folder / "a run" / "checkpoints" / f"step-{STEPS:08}").is_dir()
    assert [pid for pid in processes(str(folder))] == []


def processes(text: str) -> list[int]:
    """Those whose command line contains `text`."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if text.encode() in file.read_bytes():
                found.append(int(file.parent.name))
        except OSError:
            continue
    return found


def test_preempted_requeued_resumed_and_finished(slurm: cluster.Cluster, tmp_path: Path) -> None:
    config, number = submit(slurm, tmp_path)
    log = tmp_path / "a run" / "metrics.jsonl"
    until(lambda: log.exists() and log.read_text().count("\n") >= 3, slurm, number, tmp_path, within=200)
    # What Slurm does before the time limit, at a time of our choosing.
    slurm.run("scancel", "--batch", "--signal=USR1", number)
    finished(slurm, config, number, tmp_path)
