"""The coordinate check: activations keep their size under CompleteP, and do not without it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.structure import instantiate
from configs.validate import parse
from launch.cli import main
from models.config import LMConfig
from models.lm import LM
from models.params import is_matrices, named_specs
from parallel.engine import Engine
from parallel.mesh import Mesh
from tests.contract.tiny import build, every_kind, of_kind
from trainer.coord_check import Point, measure, sized, slope, slopes
from trainer.optim.base import OptimConfig

ROOT = Path(__file__).resolve().parents[2]
STEPS = 3
# At these sizes sums of some ten tokens' parts still differ from their limit by as much.
FLAT = 0.15


def base(**fields: Any) -> LMConfig:
    layer = {"mixer": {"kind": "attention", "num_heads": 4}, "ffn": {"kind": "swiglu", "hidden": 64}}
    data = {"vocab_size": 64, "d_model": 32, "pattern": "A", "repeat": 2, "layers": {"A": layer}}
    return instantiate(LMConfig, {**data, **fields})


def points(along: str, sizes: tuple[int, ...], **fields: Any) -> list[Point]:
    optim = parse(OptimConfig, {"kind": "adamw", "lr": 4e-3})
    return [p for size in sizes for p in measure(sized(base(**fields), **{along: size}), optim, STEPS, seed=0)]


def test_completep_is_flat_in_width_and_depth_and_the_standard_is_not() -> None:
    scaling = {"scaling": {"kind": "completep", "base_width": 32, "base_layers": 2}}
    for along, sizes in (("width", (64, 128, 256)), ("layers", (2, 4, 8))):
        found = slopes(points(along, sizes, **scaling), along, STEPS)
        assert max(map(abs, found.values())) < FLAT, (along, found)
    wider = slopes(points("width", (64, 128, 256)), "width", STEPS)
    assert min(wider.values()) > 0.5, wider
    deeper = slopes(points("layers", (2, 4, 8)), "layers", STEPS)
    assert deeper["stream"] > 0.3, deeper


def test_an_update_of_muon_keeps_its_spectral_norm_per_width() -> None:
    """Four times as wide, where Adam takes a quarter of its rate: the form that goes by the shape takes all of it, and
    the one that has Adam's root mean square a half."""
    scaling = {"kind": "completep", "base_width": 4, "base_layers": 2}
    changes = {}
    for kind in ("none", "completep"):
        for adjust in ("original", "match_rms_adamw"):
            optim = parse(OptimConfig, {"kind": "muon", "lr": 0.01, "adjust_lr": adjust, "weight_decay": 0.0})
            config = build(2, scaling=scaling if kind != "none" else "none")
            engine = Engine(config, Mesh.single(), seed=0, dtype=torch.float64)
            held = next(one for one in engine.held() if one.shard.name == "layers.0.ffn.branch.ffn.up.weight")
            for one in engine.held():
                generator = torch.Generator().manual_seed(1)
                one.parameter.grad = torch.randn(one.parameter.shape, generator=generator, dtype=torch.float64)
            before = held.parameter.detach().clone()
            optim.build(engine).step(0.01)
            changes[kind, adjust] = (held.parameter.detach() - before).norm()
    assert changes["completep", "original"] / changes["none", "original"] == pytest.approx(1.0)
    assert changes["completep", "match_rms_adamw"] / changes["none", "match_rms_adamw"] == pytest.approx(0.5)


def test_slope_is_the_power() -> None:
    assert slope([2, 4, 8], [3 * 2**1.5, 3 * 4**1.5, 3 * 8**1.5]) == pytest.approx(1.5)


def test_sizes_grow_in_proportion() -> None:
    config = sized(build(4, ffn="moe"), width=32, layers=6)
    layer = config.expanded[0]
    assert (config.d_model, len(config.expanded)) == (32, 6)
    assert (layer.mixer.num_heads, layer.mixer.num_kv_heads, layer.ffn.hidden) == (16, 8, 16)  # type: ignore[attr-defined]
    assert layer.ffn.num_experts == 4  # type: ignore[attr-defined]
    with pytest.raises(
        ValueError, match="mixer attention has num_heads 4 at d_model 32, which at 20 is no whole number"
    ):
        sized(base(), width=20)
    with pytest.raises(ValueError, match="3 layers are no whole number of patterns 'AA'; use multiples of 2"):
        sized(base(pattern="AA"), layers=3)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(ROOT / "configs/debug_completep.yaml")
    arguments = ["coord-check", config, "model.vocab_size=32", "--widths", "32,64", "--steps", "1"]
    plot = tmp_path / "coordinates.png"
    assert main([*arguments, "--plot", str(plot)]) == 0
    out = capsys.readouterr().out
    assert "d_model 32, 64" in out and out.count("change") == 4 and plot.stat().st_size > 1000
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["width"]) == 2 * 2 * 4 and found["layers"] == []


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ([], "there is nothing to compare; give two sizes or more"),
        (["--widths", "32,32"], "--widths is 32,32; give two different sizes or more"),
        (["--widths", "32,48", "--steps", "0"], "--steps is 0; it must be at least 1"),
        (["--widths", "32,33"], "no whole number; use another width"),
        (["--depths", "1,2", "--plot", "configs/demo.yaml"], "exists and is not overwritten"),
        (["--depths", "1,2", "--plot", "nowhere/a.png"], "is no folder; make it first"),
    ],
)
def test_refusals(
    options: list[str], sentence: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    assert main(["coord-check", "configs/debug_completep.yaml", *options]) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1


@pytest.mark.parametrize(("slot", "kind"), every_kind())
def test_wide_matrices_have_more_inputs_in_a_wider_model(slot: str, kind: str) -> None:
    """And others have not: scaled as if they had, their outputs would shrink with the width."""
    config = of_kind(slot, kind)
    with torch.device("meta"):
        try:
            models = [LM(config), LM(sized(config, width=2 * config.d_model))]
        except ValueError as error:
            pytest.skip(str(error))
    specs, wider = ({name: spec for name, _, _, spec in named_specs(model)} for model in models)
    for name, spec in specs.items():
        if spec.role in ("matrix", "gate", "router") and len(spec.shape) > 1:
            stacked = spec.role == "matrix" and is_matrices(spec)
            inputs = 1 if stacked else 0 if name.endswith(("dynamic_alpha", "dynamic_beta")) else -1
            assert spec.wide == (wider[name].shape[inputs] > spec.shape[inputs]), name
