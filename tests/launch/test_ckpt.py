"""`weft ckpt` shows what a mesh wrote, in one process that belongs to no group."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from launch.cli import main
from parallel.mesh import MeshConfig
from parallel.testing import Pool
from tests.trainer import runs
from trainer import checkpoint


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, pool: Pool) -> Path:
    """Of two ranks, with checkpoints of steps 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("ckpt")
    data = runs.prepare_data(folder)
    config = runs.run_config(data, folder / "run", MeshConfig(fsdp=2), keep_checkpoints=3)
    pool.run(runs.run_through, 2, config)
    return folder / "run"


def outcome(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    code = main(["ckpt", *map(str, arguments)])
    out, error = capsys.readouterr()
    return code, out, error


def test_ls(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = outcome(capsys, "ls", run)
    assert code == 0 and [line.split()[0] for line in out.splitlines()] == ["2", "4", "6"]
    assert out.count("complete") == 3
    rows = json.loads(outcome(capsys, "ls", run / "config.yaml", "--json")[1])
    sizes = [sum(file.stat().st_size for file in Path(row["path"]).iterdir()) for row in rows]
    assert [row["bytes"] for row in rows] == sizes
    assert not dist.is_initialized()


def test_verify_sees_one_changed_bit(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, error = outcome(capsys, "verify", run)
    assert code == 0 and out.count(": ok") == 3 and error == ""
    file = run / "checkpoints" / "step-00000004" / "optimizer-00001-000.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    try:
        code, out, _ = outcome(capsys, "verify", run)
        assert code == 1 and f"step-00000004: damaged: {file.name} is not what was written" in out
        assert outcome(capsys, "verify", file.parent.parent / "step-00000006")[0] == 0
        # The sizes are right, and ls looks no further.
        code, out, _ = outcome(capsys, "ls", run)
        assert code == 0 and out.count("complete") == 3
        file.write_bytes(data[:-1])
        code, out, _ = outcome(capsys, "ls", run)
        assert code == 1 and out.count("complete") == 2 and "damaged: optimizer-00001-000.safetensors has " in out
        assert outcome(capsys, "ls", run, "--json")[0] == 1
    finally:
        data[-1] ^= 1
        file.write_bytes(data)


def test_show(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = json.loads(outcome(capsys, "show", run, "--json")[1])
    assert shown["mesh"] == "fsdp=2" and shown["state"] == {"step": 6, "samples": 24, "tokens": 576}
    assert shown["optimizer"] == ["exp_avg", "exp_avg_sq", "step"] and shown["config"]["train"]["steps"] == 6
    content = checkpoint.read(run / "checkpoints" / "step-00000006")
    assert [tensor["name"] for tensor in shown["tensors"]] == list(content.model)
    for tensor in shown["tensors"]:
        value = content.model[tensor["name"]]
        assert tensor["shape"] == list(value.shape)
        assert tensor["norm"] == pytest.approx(float(torch.linalg.vector_norm(value, dtype=torch.float64)))
    code, out, _ = outcome(capsys, "show", run / "checkpoints" / "step-00000002")
    assert code == 0 and "step-00000002: step 2, " in out and "written on: fsdp=2" in out and "embed.weight" in out


def test_a_checkpoint_can_be_named_where_a_run_can(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(run / "checkpoints" / "step-00000002"), "--json"]) == 0
    early = json.loads(capsys.readouterr().out)["loss"]
    assert main(["eval", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["loss"] < early


@pytest.mark.parametrize("command", ["ls", "verify", "show"])
def test_none_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str) -> None:
    for path in (tmp_path, tmp_path / "nowhere", tmp_path / "step-00000003"):
        code, out, error = outcome(capsys, command, path)
        assert (code, out) == (2, "") and error.startswith(f"weft: {path} has no checkpoint; give")
