"""Which code a cell's outcome depends on: what comparing imports, and the plug-ins of its model with what they import.

A plug-in is found by scanning a folder, so that no import leads to one that a cell does not use: a new one leaves the
records of all others as they are.
"""

import hashlib
import importlib.util
from collections.abc import Iterable
from pathlib import Path

import grimp
import torch

from models.plugin import plugins_in
from tests.matrix import cells
from tests.matrix.cells import Cell

PACKAGES = ("configs", "models", "parallel", "trainer", "tests")
ALWAYS = ("parallel.check", "parallel.testing", "tests.matrix.cells")


class Versions:
    """The version of the code behind each cell, torch's included: 12 hexadecimal digits."""

    def __init__(self) -> None:
        self._graph = grimp.build_graph(*PACKAGES, cache_dir=None)
        self._versions: dict[frozenset[str], str] = {}

    def of(self, cell: Cell) -> str:
        modules = frozenset(self.behind_cell(cell))
        if modules not in self._versions:
            self._versions[modules] = digest(modules)
        return self._versions[modules]

    def behind_cell(self, cell: Cell) -> set[str]:
        try:
            return self.behind({*ALWAYS, *(type(plugin).__module__ for plugin in plugins_in(cells.parts(cell)))})
        except ValueError:
            # Refused by what its kinds say of each other, which may stand anywhere.
            return set(self._graph.modules)

    def behind(self, modules: Iterable[str]) -> set[str]:
        """These and all that they import, directly or not. One of a folder outside the project stands for itself."""
        found = set(modules)
        return found.union(*(self._graph.find_upstream_modules(name) for name in found & self._graph.modules))


def digest(modules: Iterable[str]) -> str:
    found = hashlib.sha256(torch.__version__.encode())
    for name in sorted(modules):
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.origin is not None
        found.update(name.encode() + b"\0" + Path(spec.origin).read_bytes() + b"\0")
    return found.hexdigest()[:12]
