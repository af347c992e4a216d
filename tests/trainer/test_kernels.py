"""Implementations in what follows a run: its evaluation, and a conversion of it."""

import dataclasses
import json
from pathlib import Path
from types import MappingProxyType

import pytest
import torch

from launch.cli import main
from models.kernels.op import ops_of
from parallel.mesh import Mesh
from tests.trainer.runs import prepare_data, run, run_config
from trainer import kernels
from trainer.process import build_engine

HALF_ULP = 2.0**-8  # of bfloat16, relative


@pytest.mark.parametrize("wanted", ["auto", "reference"])
def test_an_evaluation_calls_what_its_run_asked_for(
    wanted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Seen by what it makes of a processor that is slow in bfloat16: products in float32, with other last bits."""
    config = run_config(prepare_data(tmp_path), tmp_path / "run", steps=2, dtype="bfloat16")
    run(dataclasses.replace(config, kernels=wanted))
    losses = []
    for amx in (True, False):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda amx=amx: MappingProxyType({"amx_tile": amx}))
        capsys.readouterr()
        assert main(["eval", str(tmp_path / "run"), "--json"]) == 0
        losses.append(json.loads(capsys.readouterr().out)["loss"])
    assert (losses[0] == losses[1]) == (wanted == "reference")
    assert losses[0] == pytest.approx(losses[1], rel=HALF_ULP)


def test_what_cannot_be_called_elsewhere_is_said_and_chosen_anew(tmp_path: Path) -> None:
    config = run_config(prepare_data(tmp_path), tmp_path / "run")
    engine, said = build_engine(config, Mesh(config.mesh)), list[str]()
    kernels.choose_again(dataclasses.replace(config, kernels={"linear": "float8"}), engine, said.append)
    assert [text.partition(", and its products need a GPU")[0] for text in said] == ["kernels.linear is float8"]
    assert said[0].endswith(": auto is taken here")
    assert all(op.call is type(op).reference for op in ops_of(engine.models[0])["linear"])
    kernels.choose_again(config, engine, said.append)
    assert len(said) == 1
