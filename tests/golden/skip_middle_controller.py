"""Skip-middle's controllers over a sequence of steps: loss, its gradient, and the prices after each step."""

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from models.depth.controllers.adaptive import AdaptiveController
from models.depth.controllers.base import GateController, penalty
from models.depth.controllers.fixed import FixedController
from models.depth.controllers.l2 import L2Controller
from models.depth.controllers.proportional import ProportionalController
from models.depth.controllers.proportional_derivative import ProportionalDerivativeController
from models.depth.controllers.targets import TargetController
from models.ffn.groups import Peers

CLASSES: Mapping[str, type[GateController]] = MappingProxyType(
    {
        "SparsityVarianceGateController": FixedController,
        "SparsityVarianceL2GateController": L2Controller,
        "AdaptiveGateController": AdaptiveController,
        "ProportionalGateController": ProportionalController,
        "ProportionalDerivativeGateController": ProportionalDerivativeController,
    }
)
FIELDS = {
    "mean_coef_init": "mean_coef",
    "var_coef_init": "var_coef",
    "mean_target_start": "first",
    "mean_target_end": "middle",
    "mean_targets": "targets",
    "var_target_delta": "var_offset",
    "ema_steps_short": "ema_short",
    "ema_steps_long": "ema_long",
    "delta_min": "tolerance",
    "coef_min": "lowest",
    "coef_max": "highest",
    "coef_update": "rate",
    "coef_update_multiplier": "rate",
    "deriv_min": "slope",
}
LEVELS = {
    "mean_coef": "mean_coefs_after_update",
    "var_coef": "var_coefs_after_update",
    "mean_short": "ema_mean_delta_short",
    "mean_long": "ema_mean_delta_long",
    "var_short": "ema_var_delta_short",
    "var_long": "ema_var_delta_long",
}


def run(inputs: dict[str, Tensor], params: dict[str, Tensor], config: dict) -> dict[str, Tensor]:
    given = {ours: config[theirs] for theirs, ours in FIELDS.items() if config.get(theirs) not in (None, "auto")}
    given = {name: value for name, value in given.items() if value not in ("inf", "-inf")}
    if "targets" in given:
        given["targets"] = tuple(given["targets"])
    controller = CLASSES[config["controller"]](stats_group="microbatch", **given)
    gates = inputs["gates"]
    like_L = gates[0, :, 0, 0].detach()
    levels = {name: torch.full_like(like_L, value) for name, value in controller.levels().items()}
    found: dict[str, list[Tensor]] = {}
    for gates_LBT in gates:
        gates_BTL = gates_LBT.movedim(0, -1)
        valid_BT = torch.ones(gates_BTL.shape[:2], dtype=torch.bool)
        loss = penalty(gates_BTL, valid_BT, controller, levels, Peers().sum) / valid_BT.sum()
        mean_L, var_L = gates_BTL.detach().mean((0, 1)), gates_BTL.detach().var((0, 1), correction=0)
        levels = controller.update(levels, mean_L, var_L)
        (slope,) = torch.autograd.grad(loss, gates_LBT, retain_graph=True)
        step = {"gates_mean": mean_L, "gates_var": var_L, "loss": loss, "grad_loss_wrt_gates": slope}
        for name, value in {**step, **{LEVELS[name]: levels[name] for name in levels.keys() & LEVELS.keys()}}.items():
            found.setdefault(name, []).append(value)
    outs = {name: torch.stack(values) for name, values in found.items()}
    if isinstance(controller, TargetController):
        outs["mean_targets"], outs["var_targets"] = controller.targets_of(like_L)
    return outs
