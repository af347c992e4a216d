"""FSDP2 over data and context ranks. Gradients are sums (divide factor 1); see `parallel.gradients` for the rest.

Experts are sharded over their own data ranks. Under schedules that split the backward pass a stage is one unit, and its
experts stay whole: per-layer units give wrong gradients there without an error (measured, torch 2.13).
"""

import warnings

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard

from models.lm import LM
from models.params import Axis
from parallel.mesh import Mesh
from parallel.precision import master, policy
from parallel.shards import EXPERT_AXES


def is_expert(module: nn.Module) -> bool:
    """Whether the module itself declares parameters with an expert axis."""
    specs = module.__dict__.get("param_specs", {}).values()
    return any(isinstance(axis, Axis) and axis.name in EXPERT_AXES for spec in specs for axis in spec.axes)


def parallelize(root: nn.Module, model: LM, mesh: Mesh, dtype: torch.dtype) -> None:
    """Shard `model`'s parameters; `root` is what is called: the model, or the stage around it.

    dtype: of the computation, see `parallel.precision`.
    """
    dense, experts = mesh.fsdp_mesh, mesh.expert_fsdp_mesh
    if dense is None or experts is None:
        return
    # State tensors are never modified in place, which is what this warning is about.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    one_unit = mesh.config.splits_backward
    # In one unit torch adds up the micro-batches' gradients itself, in the type of the gathered parameters.
    mixed = policy(master(dtype) if one_unit else dtype)
    # None is torch's default: all units but the outermost free what they gathered.
    own = {"mp_policy": mixed, "reshard_after_forward": None if mesh.config.reshard else False}
    whole: set[nn.Parameter] = set()
    for module in [m for m in model.modules() if is_expert(m)]:
        if one_unit or experts.size(-1) == 1:
            whole |= set(module.parameters(recurse=False))
        else:
            fully_shard(module, mesh=experts, **own)
    if not one_unit:
        for module in shared(model):
            fully_shard(module, mesh=dense, ignored_params=whole, **own)
        for layer in model.blocks:
            fully_shard(layer, mesh=dense, ignored_params=whole, **own)
    fully_shard(root, mesh=dense, ignored_params=whole, **own)
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def holds_units(module: nn.Module) -> bool:
    """Whether parts of it are FSDP units of their own."""
    return any(isinstance(part, FSDPModule) for part in module.modules() if part is not module)


def shared(model: LM) -> list[nn.Module]:
    """The outermost modules that several layers hold: two units cannot hold the same parameters."""
    holders: dict[nn.Module, int] = {}
    for layer in model.blocks:
        for module in layer.modules():
            # FSDP acts when a module is called: a list of modules is not.
            if not isinstance(module, nn.ModuleList) and next(module.parameters(), None) is not None:
                holders[module] = holders.get(module, 0) + 1
    several = [module for module, count in holders.items() if count > 1]
    inside = {child for module in several for child in module.modules() if child is not module}
    return [module for module in several if module not in inside]


def reshard(root: nn.Module) -> None:
    """Free the whole parameters that a forward pass without a backward pass leaves in the outermost unit.

    Until then its parameters are not those that gradients and the optimiser know.
    """
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
