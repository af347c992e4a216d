"""What every optimiser is: a config that builds it over an engine, and state by parameter.

An update is of each rank's own piece of a parameter, so that nothing here knows a mesh.
"""

import dataclasses
from collections.abc import Iterator
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from models.config import default
from models.limits import above_zero, at_least
from models.memory.host import host_of
from models.plugin import Plugin
from parallel.gradients import Held
from trainer.optim.groups import GroupConfig, Setting, settings
from trainer.optim.states import HostStates, States
from trainer.sparsity.base import SparsityConfig

if TYPE_CHECKING:
    from parallel.engine import Engine


@dataclasses.dataclass(frozen=True)
class OptimConfig(Plugin, slot="optim", folder="trainer.optim"):
    """What a step makes of the gradients.

    lr: the highest of the schedule. weight_decay: decoupled, times lr, of the parameters that declare to decay.
    clip: the largest norm of the whole gradient, null for no limit. groups: parameters that are treated apart; the
    first that matches counts. offload: the state waits in host memory but for that of so many MiB of a rank's
    parameters at a time; null keeps all of it on the device. sparsity: which weights are seen.
    """

    lr: float
    weight_decay: float = 0.1
    clip: float | None = 1.0
    groups: tuple[GroupConfig, ...] = ()
    offload: float | None = None
    sparsity: SparsityConfig = default(SparsityConfig, "none")

    example = MappingProxyType({"lr": 1e-3})

    def __post_init__(self) -> None:
        at_least(self, 0, "lr", "weight_decay")
        above_zero(self, "clip", hint=", or null for no clipping")
        above_zero(self, "offload", hint=", such as 256, or null to keep the state on the device")

    def patterns(self) -> list[tuple[str, str]]:
        """(dotted key, value) of everything that must mean a parameter of the model."""
        groups = [(f"optim.groups.{i}.match", group.match) for i, group in enumerate(self.groups)]
        return groups + [(f"optim.sparsity.{key}", pattern) for key, pattern in self.sparsity.patterns()]

    def build(self, engine: "Engine") -> "Optimizer":
        raise NotImplementedError


def local(value: Tensor) -> Tensor:
    """This rank's part of a parameter or of its state, without a copy."""
    return value.to_local() if isinstance(value, DTensor) else value


class Optimizer:
    """Base of all optimisers; fulfils `trainer.state.OptimizerState`. A kind defines `first_state` and `update`."""

    def __init__(self, engine: "Engine", config: OptimConfig) -> None:
        self.engine = engine
        self._settings = settings(engine.config, config.groups, config.weight_decay)
        self.states = States()
        if config.offload is not None:
            self.states = HostStates(host_of(torch.device(engine.mesh.device)), config.offload)
        self.sparsity = config.sparsity.build(self)

    def setting(self, held: Held) -> Setting:
        """By the owner's name, so that copies of a shared parameter stay equal."""
        return self._settings[held.shard.name]

    def first_state(self, held: Held) -> dict[str, Tensor]:
        """What is kept for a parameter before its first update, on the parameter's device; see `state`."""
        raise NotImplementedError

    def update(self, held: list[Held], lr: float) -> None:
        """Change some parameters in place, from their gradients. Called without gradients being recorded, once per
        step for every parameter, on all ranks of a pipeline stage with the same ones."""
        raise NotImplementedError

    def begin(self, lr: float) -> None:
        """See `trainer.state.Updater`."""
        self.sparsity.begin()

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Update every parameter from its gradient (a collective). lr: of a parameter whose group does not scale it."""
        for parameters in self.rounds():
            with self.sparsity.updating(parameters):
                self.update(parameters, lr)

    def report(self) -> dict[str, float]:
        """See `trainer.state.Updater`."""
        return self.sparsity.report()

    def rounds(self) -> Iterator[list[Held]]:
        """All parameters, in the parts in which they are updated."""
        return self.states.rounds(list(self.engine.held()), self._first)

    def state(self, held: Held) -> dict[str, Tensor]:
        """See `trainer.state.OptimizerState`."""
        return self.states.of(held, self._first)

    def _first(self, held: Held) -> dict[str, Tensor]:
        return {**self.first_state(held), **self.sparsity.first_state(held)}


def one_step(config: OptimConfig, engine: "Engine") -> None:
    """A first update with a large learning rate, to compare meshes by."""
    config.build(engine).step(0.01)


def two_steps(config: OptimConfig, engine: "Engine") -> None:
    """Two updates by the same gradients, as a run takes them, to compare meshes by."""
    optimizer = config.build(engine)
    for _ in range(2):
        optimizer.begin(0.01)
        optimizer.step(0.01)
