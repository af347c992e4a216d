"""Two hosts, one of which is lost in the middle of a run: the other says so in time, and both resume."""

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.hosts import Hosts, NoHosts, two_hosts
from configs.structure import to_plain
from configs.text import dump_yaml
from parallel.mesh import MeshConfig
from parallel.testing import Pool
from tests.trainer import runs
from trainer import checkpoint
from trainer.watch import BEAT, GRACE

TIMEOUT = 6


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    try:
        with two_hosts() as made:
            yield made
    except NoHosts as error:
        pytest.skip(str(error))


def start(hosts: Hosts, config: Path, log: Path, *more: str) -> list[subprocess.Popen[str]]:
    """torchrun on each host."""
    rendezvous = ["--rdzv-backend=c10d", f"--rdzv-endpoint={hosts.address}:29500", "--rdzv-id=hosts"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", *rendezvous]
    started = []
    for host in (0, 1):
        with (log / f"{host}.log").open("a") as out:
            own = f"--local-addr=10.77.0.{host + 1}"
            command = [*torchrun, own, "-m", "trainer.train", str(config), *more]
            started.append(hosts.start(host, command, stdout=out, stderr=out))
    return started


def said(log: Path, host: int) -> list[str]:
    """What our own processes of a host wrote as a sentence."""
    text = (log / f"{host}.log").read_text()
    return [line for line in text.splitlines() if line.startswith(("weft:", "error"))]


@pytest.mark.parametrize(
    ("loss", "lost"),
    [
        ("power", 1),
        pytest.param("power", 0, marks=pytest.mark.slow),
        pytest.param("cable", 1, marks=pytest.mark.slow),
        pytest.param("cable", 0, marks=pytest.mark.slow),
    ],
)
def test_a_host_is_lost_and_comes_back(tmp_path: Path, pool: Pool, hosts: Hosts, loss: str, lost: int) -> None:
    data, mesh, left = runs.prepare_data(tmp_path), MeshConfig(fsdp=2), 1 - lost
    settings = {"steps": 100_000, "save_every": 2, "timeout": TIMEOUT, "eval_every": 5}
    config = runs.run_config(data, tmp_path / "run", mesh, **settings)
    file, folder = tmp_path / "config.yaml", tmp_path / "run" / "checkpoints"
    file.write_text(dump_yaml(to_plain(config)))
    agents = start(hosts, file, tmp_path)
    deadline = time.monotonic() + 150
    while max(checkpoint.steps(folder), default=0) < 4:
        assert time.monotonic() < deadline and agents[left].poll() is None, said(tmp_path, left)
        time.sleep(0.05)
    # The steps above may take less than it takes a process to say where it is.
    time.sleep(2 * BEAT)
    (hosts.kill if loss == "power" else hosts.cut)(lost)
    gone = time.monotonic()
    while not said(tmp_path, left):
        # Until a collective ends, then for the reports of the others, on a machine that may be busy.
        assert time.monotonic() < gone + TIMEOUT + 20, (tmp_path / f"{left}.log").read_text()
        time.sleep(0.05)
    if (loss, lost) == ("power", 1):
        assert agents[left].wait(60) != 0
    time.sleep(2 * GRACE)
    hosts.kill(left)
    hosts.kill(lost)
    (line,) = said(tmp_path, left)
    found = re.fullmatch(
        rf"weft: rank {lost} on {'ab'[lost]} (is gone|does not answer), last seen in step \d+, [\w ]+; "
        rf"rank {left} on {'ab'[left]} waited in step \d+, [\w ]+( for {TIMEOUT} s \(train\.timeout\))?; "
        r"the same command again resumes after step (?P<step>\d+)",
        line,
    )
    assert found, line
    assert "Traceback" not in (tmp_path / f"{left}.log").read_text().split("weft:")[0]
    newest = checkpoint.newest(folder, pytest.fail)
    assert newest is not None
    step = int(newest.name.removeprefix("step-"))
    assert step >= int(found["step"])

    hosts.mend(lost)
    agents = start(hosts, file, tmp_path, f"--stop-after={step + 5}")
    assert [agent.wait(200) for agent in agents] == [0, 0], (tmp_path / "0.log").read_text()
    whole = runs.run_config(data, tmp_path / "whole", mesh, **settings)
    pool.run(runs.run_to, 2, whole, step + 5)
    assert runs.records(config) == runs.records(whole)
