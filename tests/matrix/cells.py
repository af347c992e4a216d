"""The cells of the support table: what is compared with one process, on which mesh, and what may be refused there."""

import dataclasses
import functools
import re
from collections.abc import Iterable
from typing import Any

from configs.structure import instantiate
from models.config import LMConfig
from models.memory.base import MemoryConfig
from models.plugin import Plugin
from parallel import check
from parallel.mesh import MeshConfig
from tests.contract.tiny import ALL_SLOTS, HYBRID, build, of_kind
from tests.matrix import covering
from tests.matrix.meshes import MESHES
from trainer.optim.adamw import AdamWConfig
from trainer.optim.base import OptimConfig, one_step, two_steps
from trainer.sparsity.base import SparsityConfig

TABLES: dict[str, type[Plugin]] = {slot.slot: slot for slot in (*ALL_SLOTS, MemoryConfig, OptimConfig, SparsityConfig)}
COMBINATION = "combination"
# Entries that cross layers, routers with losses and statistics, recurrences, draws, layers that can be undone, and an
# embedding that is the head too.
MODEL: dict[str, Any] = {
    **HYBRID,
    "residual": "reversible",
    "values": "resformer",
    "depth": "stochastic",
    "tie_embeddings": True,
}

# Every reason why a cell may be refused. Another sentence in its place is a failure.
REFUSALS = (
    r"e(p|tp) is \d+ and the model has no experts; ",
    r"etp is \d+ and residual desync gives each tensor rank a part of an expert's width; ",
    r"overlap is true, and ",
    r"memory pareprop runs a layer again before FSDP has gathered its parameters, ",
    r"memory (reversible|pareprop) undoes layers, and residual ladder cannot be undone; ",
    r"schedule \w+ takes gradients of inputs and of weights in passes of their own, and memory (reversible|pareprop) ",
    r"shortcut \w+ acts on one identity path, which residual ladder does not have; ",
)


@dataclasses.dataclass(frozen=True)
class Cell:
    """table: a slot, or "combination". row: a kind; of a combination the kinds of all slots, in order. mesh: one of
    MESHES; empty for a combination, which is tried on one that takes it."""

    table: str
    row: str
    mesh: str

    def __str__(self) -> str:
        return "-".join(filter(None, (self.table, self.row.replace(" ", "+"), self.mesh)))


@dataclasses.dataclass(frozen=True)
class Trial:
    """What a cell has the matrix compare. Raises ValueError where it is refused."""

    config: LMConfig
    mesh: str
    settings: check.Settings

    def refuse(self) -> None:
        check.refuse_combination(self.config, MeshConfig.parse(self.mesh), self.settings)


def on_meshes() -> list[Cell]:
    """Every kind on every mesh."""
    return [Cell(name, kind, mesh) for name, slot in TABLES.items() for kind in slot.kinds() for mesh in MESHES]


def combinations(rows: Iterable[covering.Choices]) -> list[Cell]:
    """The models of a covering array."""
    return [Cell(COMBINATION, " ".join(kind for _, kind in row), "") for row in rows]


def needs(mesh: str) -> dict[str, Any]:
    """The kinds that a mesh is for: experts beside which others stand, the residual whose sums can wait."""
    config = MeshConfig.parse(mesh)
    return {
        **({"ffn": "moe"} if config.expert_ranks > 1 else {}),
        **({"residual": "ladder"} if config.overlap else {}),
    }


def parts(cell: Cell) -> tuple[LMConfig, MemoryConfig | OptimConfig | SparsityConfig | None]:
    """The model, and what is tried on it if that is no part of a model. Raises ValueError where the kinds alone are
    refused."""
    if cell.table == COMBINATION:
        return covering.config_of(tuple(zip(covering.kinds(), cell.row.split(), strict=True))), None
    if TABLES[cell.table] in ALL_SLOTS:
        return of_kind(cell.table, cell.row, **needs(cell.mesh)), None
    config = build(**(needs(cell.mesh) if MeshConfig.parse(cell.mesh).overlap else MODEL))
    example = TABLES[cell.table].of_kind(cell.row).example
    kind = instantiate(TABLES[cell.table], {"kind": cell.row, **example})
    assert isinstance(kind, MemoryConfig | OptimConfig | SparsityConfig)
    return config, kind


def trial(cell: Cell) -> Trial:
    """Raises ValueError where the kinds alone are refused."""
    config, kind = parts(cell)
    if isinstance(kind, OptimConfig):
        return Trial(config, cell.mesh, check.Settings(update=functools.partial(one_step, kind)))
    if isinstance(kind, SparsityConfig):
        optim = AdamWConfig(lr=0.01, sparsity=kind)
        return Trial(config, cell.mesh, check.Settings(update=functools.partial(two_steps, optim)))
    if isinstance(kind, MemoryConfig):
        return Trial(config, cell.mesh, check.Settings(memory=kind))
    if cell.mesh:
        return Trial(config, cell.mesh, check.Settings())
    return on_some_mesh(cell, config)


def on_some_mesh(cell: Cell, config: LMConfig) -> Trial:
    """The model on the first mesh that takes it, each model from another one on."""
    turn = combinations(covering.array()[0]).index(cell)
    for mesh in (*MESHES[turn % len(MESHES) :], *MESHES):
        found = Trial(config, mesh, check.Settings())
        try:
            found.refuse()
        except ValueError:
            continue
        return found
    raise AssertionError(f"no mesh takes {cell.row}")


def may_be_refused(reason: str) -> bool:
    return any(re.match(pattern, reason) for pattern in REFUSALS)
