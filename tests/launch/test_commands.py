"""What `weft config`, `weft plugins` and `weft check` print."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from launch.cli import main
from launch.local import ROOT
from tests.launch.test_cli import CONFIG, in_the_root, printed

__all__ = ["in_the_root"]


def test_config_show_is_a_config(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    text = printed(capsys, "config", "show", CONFIG, "train.steps=7", "model.layers.A.mixer.num_heads=8")
    file = tmp_path / "shown.yaml"
    file.write_text(text)
    assert "  steps: 7\n" in text and "num_heads: 8\n" in text and "schedule: 1f1b\n" in text
    assert printed(capsys, "config", "show", str(file)) == text


def test_config_validate(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    bad, worse = tmp_path / "bad.yaml", tmp_path / "worse.yaml"
    bad.write_text(f"base: {ROOT / CONFIG}\ntrain: {{steps: 0}}\n")
    worse.write_text("a: [")
    assert main(["config", "validate", CONFIG, str(bad), str(worse)]) == 2
    out, err = capsys.readouterr()
    assert out == f"{CONFIG}: ok\n"
    assert err.splitlines()[0] == f"weft: {bad}: train: steps is 0; it must be at least 1"
    assert err.splitlines()[1].startswith(f"weft: {worse}:1: ") and len(err.splitlines()) == 2


def test_config_schema(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "schema.json"
    assert printed(capsys, "config", "schema", "-o", str(file)) == ""
    assert json.loads(printed(capsys, "config", "schema")) == json.loads(file.read_text())
    assert json.loads(file.read_text())["title"] == "Weft run"


def test_plugins(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, "plugins")
    assert re.search(r"^  attention +Causal softmax attention.* models/mixers/attention\.py$", text, re.MULTILINE)
    assert text.startswith("mixer\n") and "\n\nffn\n" in text
    rows = json.loads(printed(capsys, "plugins", "norm", "--json"))
    assert [(row["slot"], row["kind"]) for row in rows] == [("norm", kind) for kind in ("none", "peri", "post", "pre")]
    assert rows[1]["fields"] == [{"name": "eps", "help": "", "default": 1e-6}]
    assert rows[1]["file"] == str(ROOT / "models/norms/peri.py")


def test_a_plug_in_from_outside_is_listed(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "scaling").mkdir()
    (tmp_path / "scaling" / "cli_outside.py").write_text(
        "import dataclasses\n\nfrom models.slots import ScalingConfig\n\n\n@dataclasses.dataclass(frozen=True)\n"
        'class Outside(ScalingConfig, kind="cli_outside"):\n    """From elsewhere."""\n'
    )
    monkeypatch.setenv("WEFT_PLUGINS", str(tmp_path))
    import models.scaling

    path, known = list(models.scaling.__path__), dict(scaling_registry())
    try:
        assert re.search(rf"cli_outside +From elsewhere\. +{re.escape(str(tmp_path))}", printed(capsys, "plugins"))
    finally:
        models.scaling.__path__[:] = path
        scaling_registry().clear()
        scaling_registry().update(known)


def scaling_registry() -> dict[str, Any]:
    from models.slots import ScalingConfig

    return ScalingConfig.registry


def test_check_reports(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from parallel import check
    from parallel.mesh import MeshConfig

    calls: list[tuple[Any, ...]] = []

    def run(config: Any, mesh: MeshConfig, settings: check.Settings) -> check.Report:
        calls.append((config, mesh, settings))
        gradient = 3e-15 if mesh.tp == 2 else 0.5
        return check.Report(str(mesh), check.Tolerance.of(settings.dtype), 0.0, 0.0, {"w": gradient}, {}, {}, [], [])

    monkeypatch.setattr(check, "run", run)
    assert printed(capsys, "check", CONFIG, "--mesh", "tp=2", "model.d_model=32") == (
        "tp=2 equals one process\nloss 0.0e+00, gradient norm 0.0e+00; of 1 gradients the worst are\n  3.0e-15 w\n"
    )
    assert calls[0][0].d_model == 32 and calls[0][2].dtype == torch.float64
    assert main(["check", CONFIG, "--mesh", "pp=2,schedule=zbv", "--dtype", "float32"]) == 1
    assert capsys.readouterr().out == (
        "pp=2,schedule=zbv differs from one process\n"
        "  gradient of w: 5.0e-01 > 1e-03\n"
        "loss 0.0e+00, gradient norm 0.0e+00; of 1 gradients the worst are\n"
        "  5.0e-01 w\n"
    )
    assert main(["check", CONFIG, "--mesh", "pp=2", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["ok"] is False


def test_plan_of_the_state(capsys: pytest.CaptureFixture[str]) -> None:
    """Who writes and reads each entry, and what lies at each boundary; a pipeline's cuts are marked."""
    file = "configs/debug_mudd_resformer_peri.yaml"
    plan = json.loads(printed(capsys, "plan", file, "--state", "--json", "mesh.pp=2", "train.micro_batch=2"))
    entries = {row["name"]: row for row in plan["entries"]}
    assert entries["past.0"]["writers"] == ["open"] and entries["past.0"]["readers"][-1] == "close"
    value = entries["first_value"]
    assert (value["shape"], value["layout"], value["heads"]) == ([2, 16], "heads", 2)
    assert (value["writers"], value["readers"][-1]) == (["layers.0.mixer"], "layers.3.mixer")
    boundaries = plan["boundaries"]
    first, second = plan["stages"]
    assert (first["layers"], second["layers"], second["rank"]) == ([0, 2], [2, 4], 1)
    assert second["received"] == boundaries[2]["entries"] and second["bytes"] == boundaries[2]["bytes"]
    assert boundaries[2]["entries"] == ["past.0", "first_value", "past.1", "past.2"]
    assert boundaries[2]["bytes"] == 4 * 2 * 64 * (3 * 64 + 2 * 16)
    lines = printed(capsys, "plan", "--state", file).splitlines()
    assert any(
        re.match(r"  first_value +B x T x 2 x 16 +float32 +heads +layers.0.mixer +layers.3.mixer", x) for x in lines
    )


def test_plan_of_a_model_alone(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "model.yaml").write_text(
        "model: {vocab_size: 32, d_model: 16, layers: {A: {mixer: {kind: attention, num_heads: 2}, "
        "ffn: {kind: moe, num_experts: 4, hidden: 8}}}, pattern: A, repeat: 2}\n"
    )
    plan = json.loads(printed(capsys, "plan", str(tmp_path / "model.yaml"), "--json"))
    assert (plan["sequences"], plan["tokens"]) == (1, 1)
    assert [row["bytes"] for row in plan["boundaries"]] == [64, 64 + 4, 64 + 4]
    assert plan["entries"][-1]["writers"] == ["layers.0", "layers.1"]
