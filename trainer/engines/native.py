"""The project's own engine, on every mesh."""

import dataclasses
from typing import TYPE_CHECKING

from parallel.engine import Engine
from parallel.mesh import Mesh
from trainer.engines.base import EngineConfig
from trainer.state import Updater

if TYPE_CHECKING:
    from trainer.config import RunConfig


@dataclasses.dataclass(frozen=True)
class NativeConfig(EngineConfig, kind="native"):
    """The project's own, over PyTorch's FSDP2, pipelining and collectives: every mesh, memory and optimiser."""

    def build(self, run: "RunConfig", mesh: Mesh) -> tuple[Engine, Updater]:
        from trainer.process import build_engine

        engine = build_engine(run, mesh, run.train.compile)
        return engine, run.optim.build(engine)
