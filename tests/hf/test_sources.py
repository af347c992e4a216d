"""Which files an export carries, and how their imports are rewritten."""

import ast
from pathlib import Path

import pytest

from models.hf.sources import Rewriter, find, flat_name

ROOT = Path(__file__).resolve().parents[2]
MODULES = sorted(
    ".".join(file.relative_to(ROOT).with_suffix("").parts)
    for file in (ROOT / "models").rglob("*.py")
    if file.name != "__init__.py"
)


def rewrite(tmp_path: Path, text: str, module: str = "models.mixers.mine") -> tuple[str, Rewriter]:
    file = tmp_path / "mine.py"
    file.write_text(text, encoding="utf-8")
    rewriter = Rewriter(module, file)
    return rewriter.rewrite(), rewriter


@pytest.mark.parametrize(
    ("before", "after", "needs"),
    [
        ("from models.rope import angles\n", "from .weft_models_rope import angles\n", {"models.rope"}),
        (
            "from models.params import (\n    Linear,\n    RMSNorm as N,\n)  # why\nx = 1\n",
            "from .weft_models_params import Linear, RMSNorm as N  # why\nx = 1\n",
            {"models.params"},
        ),
        ("from ..state import State\n", "from .weft_models_state import State\n", {"models.state"}),
        (
            "from .attention import attend\n",
            "from .weft_models_mixers_attention import attend\n",
            {"models.mixers.attention"},
        ),
        (
            "def f():\n    from models import rope as r\n    return r\n",
            "def f():\n    from .weft_models_rope import __name__ as _  # noqa: F401\n"
            "    from . import weft_models_rope as r\n    return r\n",
            {"models.rope"},
        ),
        (
            "import models.rope as rope\n",
            "from .weft_models_rope import __name__ as _  # noqa: F401\nfrom . import weft_models_rope as rope\n",
            {"models.rope"},
        ),
        (
            "from configs.structure import to_plain\n",
            "from .weft_configs_structure import to_plain\n",
            {"configs.structure"},
        ),
        ("import math\nimport torch.nn.functional as F\n", "import math\nimport torch.nn.functional as F\n", set()),
        ("s = 'from models.rope import angles'\n", "s = 'from models.rope import angles'\n", set()),
        (
            "\u00e9 = 1\nfrom models.rope import angles\n",
            "\u00e9 = 1\nfrom .weft_models_rope import angles\n",
            {"models.rope"},
        ),
    ],
)
def test_imports_become_relative(tmp_path: Path, before: str, after: str, needs: set[str]) -> None:
    text, rewriter = rewrite(tmp_path, before)
    assert text == after
    assert rewriter.needs == needs


def test_optional_packages_stand_under_try(tmp_path: Path) -> None:
    text, rewriter = rewrite(tmp_path, "def f():\n    import triton.language as tl\n    return tl\n")
    expected = "    try:\n        import triton.language as tl\n    except ImportError:\n        raise\n"
    assert text == f"def f():\n{expected}    return tl\n"
    assert rewriter.optional == {"triton"}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("import models.rope\n", "binds a package"),
        ("x = 1; from models.rope import angles\n", "shares its line"),
        ("from models.rope import angles; x = 1\n", "shares its line"),
        ("from models.nowhere import x\n", "imports models.nowhere, which does not exist"),
    ],
)
def test_what_cannot_be_rewritten_is_refused(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        rewrite(tmp_path, text)


@pytest.mark.parametrize("module", MODULES)
def test_every_file_of_ours_can_be_exported(module: str) -> None:
    path = find(module)
    assert path is not None
    rewriter = Rewriter(module, path)
    for node in ast.walk(ast.parse(rewriter.rewrite())):
        if isinstance(node, ast.ImportFrom) and not node.level:
            assert node.module is not None and node.module.split(".")[0] not in ("models", "configs")


def test_flat_names_differ() -> None:
    names = [flat_name(module) for module in MODULES]
    assert len(set(names)) == len(names)
