"""Two machines by hand: one agent each, here on one machine, and torchrun's own or ours."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from configs.structure import to_plain
from configs.text import dump_yaml
from launch.local import ROOT, environment
from parallel.mesh import MeshConfig
from tests.launch.cluster import free_ports
from tests.trainer.runs import prepare_data, records, run_config

TORCHRUN = ["torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d"]


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(
            [*TORCHRUN, "--rdzv-endpoint={endpoint}", "--rdzv-id=two", "-m", "trainer.train", "{config}"], id="torchrun"
        ),
        # Slow, since test_hosts.py starts runs so too.
        pytest.param(
            ["launch.cli", "launch", "--nodes=2", "--rdzv-endpoint={endpoint}", "--rdzv-id=two", "{config}"],
            id="weft",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_two_machines_by_hand(tmp_path: Path, command: list[str]) -> None:
    config = run_config(prepare_data(tmp_path), tmp_path / "run", MeshConfig(fsdp=2), steps=3)
    file = tmp_path / "config.yaml"
    file.write_text(dump_yaml(to_plain(config)))
    endpoint = f"localhost:{free_ports(1)[0]}"
    words = [word.format(endpoint=endpoint, config=file) for word in command]
    agents = [
        subprocess.Popen(
            [sys.executable, "-m", *words],
            env={**environment(os.environ), "OMP_NUM_THREADS": "1"},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for _ in range(2)
    ]
    try:
        said = [agent.communicate(timeout=250)[0] for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
    assert [agent.returncode for agent in agents] == [0, 0], said
    assert [record["step"] for record in records(config) if "train/loss" in record] == [1, 2, 3]
    assert (tmp_path / "run" / "checkpoints" / "step-00000003").is_dir()


def test_what_all_processes_refuse_is_said_once(tmp_path: Path) -> None:
    config = run_config(prepare_data(tmp_path), tmp_path / "run", MeshConfig(fsdp=2), steps=3)
    file = tmp_path / "config.yaml"
    file.write_text(dump_yaml(to_plain(config)))

    words = ["torch.distributed.run", "--standalone", "--local-addr=localhost", "--nproc-per-node=2"]
    done = subprocess.run(
        [sys.executable, "-m", *words, "-m", "trainer.train", str(file), "mesh.fsdp=4", "train.global_batch=8"],
        env={**environment(os.environ), "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 1, "torchrun's own"
    said = [line for line in done.stderr.splitlines() if line.startswith("error")]
    # torchrun's report has lines that begin so too.
    assert [line for line in said if "started" in line] == [
        "error: the mesh fsdp=4 takes 4 processes and 2 were started; start 4"
    ]
    assert not (tmp_path / "run").exists()
