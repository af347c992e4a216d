"""AdamW over what an engine holds. Its state is kept by parameter name, whole, and so fits every mesh.

Source: Loshchilov & Hutter, arXiv 1711.05101.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from parallel.engine import Engine
from parallel.gradients import Held
from parallel.shards import write
from trainer.config import AdamWConfig

MOMENTS = ("exp_avg", "exp_avg_sq")


def groups(engine: Engine, weight_decay: float) -> list[dict[str, Any]]:
    """Parameters by whether they decay and by the mesh they are sharded on: torch cannot mix meshes in one group."""
    found: dict[tuple[bool, object], list[Tensor]] = {}
    for held in engine.held():
        mesh = held.parameter.device_mesh if isinstance(held.parameter, DTensor) else None
        found.setdefault((held.shard.spec.decay, mesh), []).append(held.parameter)
    return [
        {"params": parameters, "weight_decay": weight_decay if decays else 0.0}
        for (decays, _), parameters in found.items()
    ]


class AdamW:
    """`steps` counts the updates, for the bias correction."""

    def __init__(self, engine: Engine, config: AdamWConfig) -> None:
        self._engine, self._steps = engine, 0
        parameters = groups(engine, config.weight_decay)
        self._adamw = torch.optim.AdamW(parameters, lr=config.lr, betas=config.betas, eps=config.eps)

    def step(self, lr: float) -> None:
        """Update every parameter from its gradient."""
        for group in self._adamw.param_groups:
            group["lr"] = lr
        self._adamw.step()
        self._steps += 1

    def state(self, held: Held) -> dict[str, Tensor]:
        """See `trainer.state.OptimizerState`: "exp_avg", "exp_avg_sq" and the count of updates, "step"."""
        own = self._adamw.state[held.parameter]
        if not own:
            own["step"] = torch.zeros(())
            own |= {moment: torch.zeros_like(held.parameter) for moment in MOMENTS}
        return own

    def full_state(self) -> dict[str, Tensor]:
        """Both moments of every parameter, whole, as "name/exp_avg" and "name/exp_avg_sq" (a collective).

        Before the first step there are none. Every rank gets those of all pipeline stages.
        """
        if not self._steps:
            return {}
        state: dict[str, Tensor] = {"steps": torch.tensor([self._steps])}
        for moment in MOMENTS:

            def pick(held: Held, moment: str = moment) -> Tensor:
                return self._adamw.state[held.parameter][moment]

            state |= {f"{name}/{moment}": value for name, value in self._engine.gather(pick).items()}
        return state

    @torch.no_grad()
    def load_full_state(self, state: Mapping[str, Tensor]) -> None:
        """Take up what `full_state` gave; every parameter must be there."""
        self._adamw.state.clear()
        self._steps = int(state["steps"]) if state else 0
        if not state:
            return
        for held in self._engine.held():
            own: dict[str, Tensor] = {"step": torch.tensor(float(self._steps))}
            for moment in MOMENTS:
                own[moment] = torch.zeros_like(held.parameter)
                write(own[moment], held.shard, state[f"{held.shard.name}/{moment}"])
            self._adamw.state[held.parameter] = own
