"""The study of hybrids: every recurrence in every ratio that docs/study.md lists, on the meta device."""

import re
from pathlib import Path

import pytest

from launch.runs import load_run
from models.cost import cost

ROOT = Path(__file__).resolve().parents[2]
MIXERS = sorted(path for path in (ROOT / "configs" / "study").glob("*.yaml") if path.stem != "full")
RATIOS = dict(
    re.findall(r"^\| (\S+) \| \d+ \| [^`]*`(.+)` \|$", (ROOT / "docs" / "study.md").read_text(), re.MULTILINE)
)


def test_there_are_six_recurrences_and_six_ratios() -> None:
    assert len(MIXERS) == 6 and list(RATIOS) == ["pure", "24:1", "12:1", "6:1", "3:1", "1:1"]


@pytest.mark.parametrize("path", MIXERS, ids=lambda path: path.stem)
def test_all_ratios_have_the_same_depth_and_about_the_same_size(path: Path) -> None:
    full = load_run(str(path.with_name("full.yaml")))
    size = cost(full.model, 2048).parameters
    shares = []
    for overrides in RATIOS.values():
        config = load_run(str(path), overrides.split())
        kinds = [layer.mixer.kind for layer in config.model.expanded]
        shares.append(kinds.count("attention"))
        assert set(kinds) <= {path.stem, "attention"} and len(kinds) == 24
        assert cost(config.model, 2048).parameters == pytest.approx(size, rel=0.03)
    assert shares == [0, 1, 2, 4, 6, 12]
