"""AdamW over what an engine holds. Its state goes by parameter name.

Source: Loshchilov & Hutter, arXiv 1711.05101.
"""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from parallel.engine import Engine
from parallel.gradients import Held
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
    """torch's, over the parameters that this rank holds."""

    def __init__(self, engine: Engine, config: AdamWConfig) -> None:
        parameters = groups(engine, config.weight_decay)
        self._adamw = torch.optim.AdamW(parameters, lr=config.lr, betas=config.betas, eps=config.eps)

    def step(self, lr: float) -> None:
        """Update every parameter from its gradient."""
        for group in self._adamw.param_groups:
            group["lr"] = lr
        self._adamw.step()

    def state(self, held: Held) -> dict[str, Tensor]:
        """See `trainer.state.OptimizerState`: "exp_avg", "exp_avg_sq" and the count of updates, "step"."""
        own = self._adamw.state[held.parameter]
        if not own:
            own["step"] = torch.zeros(())
            own |= {moment: torch.zeros_like(held.parameter) for moment in MOMENTS}
        return own
