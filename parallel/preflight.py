"""Whether a model fits a mesh: every refusal before anything is allocated, in one sentence with the way out."""

import dataclasses

import torch
from torch import nn

from configs.structure import instantiate
from models.config import LMConfig
from models.lm import LM
from models.params import Parts, named_specs
from models.slots import FFNConfig
from parallel import pipeline
from parallel.mesh import MeshConfig
from parallel.shards import EXPERT_AXES, TENSOR_AXES, fits, refuse_uneven


def refuse(config: LMConfig, mesh: MeshConfig) -> None:
    """Raise ValueError with the first reason why the mesh cannot hold the model."""
    with torch.device("meta"):
        model = LM(config)
    refuse_uneven(model, {"tp": mesh.tp, "ep": mesh.ep})
    if mesh.pp > 1:
        pipeline.refuse(mesh, len(config.expanded), micro_batches=2 * mesh.pp)
    if mesh.tp > 1:
        refuse_unsplit(model)
    if mesh.cp > 1:
        refuse_heads(model, mesh)
    if mesh.ep > 1 and not has_experts(model):
        others = FFNConfig.such_as(lambda kind: has_experts(example(kind, config)))
        raise ValueError(f"ep is {mesh.ep} and the model has no experts; use ep=1, or an ffn with experts{others}")


def axes_of(module: nn.Module) -> set[str]:
    """The names of all axes that a module's parameters declare."""
    dims = [dim for _, _, _, spec in named_specs(module) for dim in spec.axes]
    axes = [axis for dim in dims for axis in (dim.axes if isinstance(dim, Parts) else (dim,))]
    return {axis.name for axis in axes if axis is not None}


def has_experts(module: nn.Module) -> bool:
    return not axes_of(module).isdisjoint(EXPERT_AXES)


def example(kind: type[FFNConfig], config: LMConfig) -> nn.Module:
    """The small instance that an FFN kind names, as the only layer of a model like `config`, on meta. Empty when it
    refuses this width."""
    try:
        layer = dataclasses.replace(config.expanded[0], ffn=instantiate(kind, kind.example))
        alone = dataclasses.replace(config, layers={"A": layer}, pattern="A", repeat=1)
        with torch.device("meta"):
            return layer.ffn.build(alone.context(0))
    except ValueError:
        return nn.Module()


def refuse_unsplit(model: LM) -> None:
    """A gathered branch returns a partial sum: one that nothing splits would be added up once per tensor rank."""
    for layer in model.blocks:
        mixer, ffn = layer.mixer.branch, layer.ffn.branch
        for branch, own in ((mixer, mixer.mixer), (ffn, ffn.ffn)):
            if branch.entry == "gathered" and not axes_of(branch) & set(TENSOR_AXES):
                raise ValueError(
                    f"{type(own).__name__} of layer {layer.index} names no axis that tp can split, so its output "
                    "would count once per rank; name the axis of its projections, or use tp=1"
                )


def refuse_heads(model: LM, mesh: MeshConfig) -> None:
    """Ulysses gives each context rank whole heads of what tensor ranks hold."""
    degree = mesh.tp * mesh.cp
    for name, _, _, spec in named_specs(model):
        parts = [axis for axes in spec.axes for axis in (axes.axes if isinstance(axes, Parts) else (axes,))]
        for axis in filter(None, parts):
            if axis.name in ("heads", "kv_heads") and not fits(axis, degree):
                near = max(n for n in range(1, min(mesh.cp, axis.groups) + 1) if fits(axis, mesh.tp * n))
                raise ValueError(
                    f"cp={mesh.cp} with tp={mesh.tp} needs {degree} to divide the {axis.groups} {axis.name} of {name}; "
                    f"use cp={near}"
                )
