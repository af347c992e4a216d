"""The slot `engine`: who holds the weights, runs the passes and takes the steps.

All but `asynchronous`, which updates late, compute the same numbers. Every engine is a `parallel.engine.Engine` to the
loop, and what it saves is the same checkpoint.
"""

import importlib.util
from typing import TYPE_CHECKING, ClassVar

from models.plugin import Plugin
from parallel.engine import Engine
from parallel.mesh import Mesh
from trainer.state import Updater

if TYPE_CHECKING:
    from trainer.config import RunConfig


class EngineConfig(Plugin, slot="engine", folder="trainer.engines"):
    """Who takes the steps of a run. package: what it needs beside Weft's own dependencies, "" for nothing; pip knows
    it as an extra of Weft: weft[engines]."""

    package: ClassVar[str] = ""

    def refuse(self, run: "RunConfig") -> None:
        """Raise ValueError for a run that it cannot take; nothing is allocated."""

    def refuse_machine(self) -> None:
        """Raise ValueError where this machine lacks the package."""
        if self.package and importlib.util.find_spec(self.package) is None:
            raise ValueError(
                f"engine.kind is {self.kind}, and the package {self.package} is not installed; "
                f"pip install -e '.[engines]' brings it, or use engine.kind=native"
            )

    def build(self, run: "RunConfig", mesh: Mesh) -> tuple[Engine, Updater]:
        """The engine with its initial weights, and what updates them. Raises ValueError for a mesh that cannot hold
        the model."""
        raise NotImplementedError


def refuse_beside_data(kind: str, run: "RunConfig") -> None:
    """Raise ValueError for what only the native engine can: other ranks than replicas, and compiled layers."""
    mesh = run.mesh
    if mesh.world_size != mesh.replicate or mesh.expert_ranks > 1:
        raise ValueError(
            f"{kind} knows data ranks alone, and the mesh is {mesh}; use mesh.dp={mesh.world_size} and nothing else, "
            "or engine.kind=native, which has the other degrees"
        )
    if run.train.compile:
        raise ValueError(f"{kind} does not run compiled layers; leave train.compile out, or use engine.kind=native")
