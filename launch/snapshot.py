"""A copy of the code that runs, so that a job in a queue does not change with the checkout."""

import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

from launch.local import ROOT

PACKAGES = ("configs", "models", "parallel", "trainer", "launch")
KEPT = (".py", ".yaml")


def plugin_roots(environment: Mapping[str, str]) -> list[Path]:
    """Folders outside the checkout that hold plug-ins."""
    return [Path(root) for root in environment.get("WEFT_PLUGINS", "").split(os.pathsep) if root]


def write(folder: Path, environment: Mapping[str, str]) -> None:
    """Copy the packages into `folder`, and the plug-ins from elsewhere into plugins/0, plugins/1, ... of it."""
    for package in PACKAGES:
        copy(ROOT / package, folder / package)
    for index, root in enumerate(plugin_roots(environment)):
        copy(root, folder / "plugins" / str(index))
    (folder / "REVISION").write_text(f"{revision()}\n", encoding="utf-8")


def plugins_of(folder: Path, environment: Mapping[str, str]) -> str:
    """What WEFT_PLUGINS is for code that runs from the copy."""
    return os.pathsep.join(str(folder / "plugins" / str(index)) for index, _ in enumerate(plugin_roots(environment)))


def copy(source: Path, target: Path) -> None:
    for file in sources(source):
        (target / file.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target / file.relative_to(source))


def sources(folder: Path) -> Iterator[Path]:
    for file in sorted(folder.rglob("*")):
        if file.suffix in KEPT and file.is_file():
            yield file


def revision() -> str:
    """The commit, marked where files differ from it; empty outside a git checkout."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:
        return ""
