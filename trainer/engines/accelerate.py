"""Hugging Face Accelerate: its process state, its preparation of the model (DistributedDataParallel) and its backward.

Weights and gradients are whole on every rank, so that norms, clipping, optimisers and checkpoints are the native ones.
"""

import contextlib
import dataclasses
import warnings
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from models.lm import Output
from parallel import pipeline
from parallel.engine import Engine
from parallel.mesh import Mesh
from trainer.engines.base import EngineConfig, refuse_beside_data
from trainer.state import Updater

if TYPE_CHECKING:
    from trainer.config import RunConfig


@dataclasses.dataclass(frozen=True)
class AccelerateConfig(EngineConfig, kind="accelerate"):
    """Hugging Face Accelerate: data ranks in DistributedDataParallel, which sums gradients while the last micro-batch's
    backward pass still runs."""

    package = "accelerate"

    def refuse(self, run: "RunConfig") -> None:
        refuse_beside_data("accelerate", run)

    def build(self, run: "RunConfig", mesh: Mesh) -> tuple[Engine, Updater]:
        engine = AccelerateEngine(run, mesh)
        return engine, run.optim.build(engine)


class AccelerateEngine(Engine):
    """Raises ValueError where Accelerate would run the mesh's ranks as processes that know nothing of each other."""

    def __init__(self, run: "RunConfig", mesh: Mesh) -> None:
        super().__init__(run.model, mesh, seed=run.run.seed, dtype=getattr(torch, run.train.dtype), memory=run.memory)
        from accelerate import Accelerator, DistributedDataParallelKwargs

        # A layer that a step leaves out has no gradient on some rank. Buffers are equal on all ranks by themselves.
        data = DistributedDataParallelKwargs(find_unused_parameters=True, broadcast_buffers=False)
        self._accelerator = Accelerator(cpu=mesh.device == "cpu", mixed_precision="no", kwargs_handlers=[data])
        with warnings.catch_warnings():
            # It hands on the option that way, whatever torch calls it.
            warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
            self._prepared = self._accelerator.prepare(self.models[0])
        if mesh.data_size > 1 and not isinstance(self._prepared, DistributedDataParallel):
            raise ValueError(
                f"accelerate sees no other process, and the mesh {mesh.config} has {mesh.data_size}: it goes by the "
                "environment, so start the run with weft train, weft launch, torchrun or accelerate launch"
            )

    def both_passes(self, side: dict[str, Tensor], scale: float, last: bool) -> Output:
        apart = contextlib.nullcontext() if last else self._accelerator.no_sync(self._prepared)
        with apart:
            out = pipeline.forward(self._prepared, side)
            assert out.loss is not None
            # It takes the mean over ranks, of what is meant to be a sum.
            self._accelerator.backward(out.loss * (scale * self.mesh.data_size))
        return out

    def complete_gradients(self) -> None:
        """The last backward pass has summed them."""
