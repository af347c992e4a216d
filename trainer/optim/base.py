"""What every optimiser is: a config that builds it over an engine, and state by parameter.

An update is of each rank's own piece of a parameter, so that nothing here knows a mesh.
"""

import dataclasses
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from models.limits import above_zero, at_least
from models.plugin import Plugin
from parallel.gradients import Held
from trainer.optim.groups import GroupConfig, Setting, settings

if TYPE_CHECKING:
    from parallel.engine import Engine


@dataclasses.dataclass(frozen=True)
class OptimConfig(Plugin, slot="optim", folder="trainer.optim"):
    """What a step makes of the gradients.

    lr: the highest of the schedule. weight_decay: decoupled, times lr, of the parameters that declare to decay.
    clip: the largest norm of the whole gradient, null for no limit. groups: parameters that are treated apart; the
    first that matches counts.
    """

    lr: float
    weight_decay: float = 0.1
    clip: float | None = 1.0
    groups: tuple[GroupConfig, ...] = ()

    example = MappingProxyType({"lr": 1e-3})

    def __post_init__(self) -> None:
        at_least(self, 0, "lr", "weight_decay")
        above_zero(self, "clip", hint=", or null for no clipping")

    def patterns(self) -> list[tuple[str, str]]:
        """(dotted key, value) of everything that must mean a parameter of the model."""
        return [(f"optim.groups.{i}.match", group.match) for i, group in enumerate(self.groups)]

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
        self._state: dict[Tensor, dict[str, Tensor]] = {}

    def setting(self, held: Held) -> Setting:
        """By the owner's name, so that copies of a shared parameter stay equal."""
        return self._settings[held.shard.name]

    def first_state(self, held: Held) -> dict[str, Tensor]:
        """What is kept for a parameter before its first update; see `state`."""
        raise NotImplementedError

    def update(self, held: list[Held], lr: float) -> None:
        """Change the parameters in place, from their gradients. Called without gradients being recorded."""
        raise NotImplementedError

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Update every parameter from its gradient (a collective). lr: of a parameter whose group does not scale it."""
        self.update(list(self.engine.held()), lr)

    def state(self, held: Held) -> dict[str, Tensor]:
        """See `trainer.state.OptimizerState`."""
        if held.parameter not in self._state:
            self._state[held.parameter] = self.first_state(held)
        return self._state[held.parameter]


def one_step(config: OptimConfig, engine: "Engine") -> None:
    """A first update with a large learning rate, to compare meshes by."""
    config.build(engine).step(0.01)
