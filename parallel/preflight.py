"""Whether a model fits a mesh: every refusal before anything is allocated, in one sentence with the way out."""

import dataclasses
import math
from collections.abc import Iterator
from types import MappingProxyType

import torch
from torch import nn

from configs.structure import instantiate
from models.config import LMConfig
from models.lm import LM
from models.memory.base import MemoryConfig
from models.memory.none import NoneConfig
from models.params import Axis, named_specs
from models.pieces import TENSOR_AXES, fits, named_axes
from models.slots import FFNConfig
from parallel import pipeline
from parallel.mesh import MeshConfig
from parallel.overlap import refuse_overlap
from parallel.shards import EXPERT_AXES, EXPERT_WIDTHS

HEAD_AXES = ("heads", "kv_heads")
SPLIT = MappingProxyType({"tp": TENSOR_AXES, "ep": EXPERT_AXES, "etp": EXPERT_WIDTHS, "cp": HEAD_AXES})


def refuse(config: LMConfig, mesh: MeshConfig, memory: MemoryConfig | None = None, compile: bool = False) -> None:
    """Raise ValueError with the first reason why the mesh cannot hold the model. memory, compile: as it is run."""
    with torch.device("meta"):
        model = LM(config)
    refuse_ranks(model, mesh)
    if mesh.tp > 1:
        refuse_unsplit(model)
    for key in ("ep", "etp"):
        if getattr(mesh, key) > 1 and not has_experts(model):
            others = FFNConfig.such_as(lambda kind: has_experts(example(kind, config)))
            degree = getattr(mesh, key)
            raise ValueError(
                f"{key} is {degree} and the model has no experts; use {key}=1, or an ffn with experts{others}"
            )
    refuse_uneven(model, mesh, "tp")
    refuse_uneven(model, mesh, "ep")
    refuse_widths(model, mesh)
    refuse_uneven(model, mesh, "etp")
    refuse_heads(model, mesh)
    refuse_overlap(model, mesh, memory or NoneConfig(), compile)
    if mesh.pp > 1:
        pipeline.refuse(mesh, len(config.expanded), micro_batches=2 * mesh.pp)


def refuse_memory(config: LMConfig, mesh: MeshConfig, memory: MemoryConfig, compile: bool) -> None:
    """Raise ValueError where the model cannot be trained with so little kept of its forward pass."""
    with torch.device("meta"):
        model = LM(config)
    memory.refuse(model)
    if compile and memory.uncompiled:
        raise ValueError(
            f"memory {memory.kind} does not go with compiled layers, {memory.uncompiled}; leave compile out, or use "
            "memory full"
        )
    if memory.ahead and mesh.shard > 1:
        raise ValueError(
            f"memory {memory.kind} runs a layer again before FSDP has gathered its parameters, and the mesh shards "
            f"them over {mesh.shard} ranks; use another memory, or a mesh without fsdp"
        )
    if mesh.splits_backward and not memory.splits_backward:
        raise ValueError(
            f"schedule {mesh.schedule} takes gradients of inputs and of weights in passes of their own, and memory "
            f"{memory.kind} has one; use schedule 1f1b or interleaved"
        )


def refuse_ranks(model: LM, mesh: MeshConfig) -> None:
    """A model that is defined for a number of tensor ranks is computed by that many, or by fewer that share them."""
    ranks = model.blocks[0].mixer.connection.by_rank
    if ranks is not None and ranks % mesh.tp:
        fits = max(tp for tp in range(1, mesh.tp) if ranks % tp == 0)
        raise ValueError(
            f"residual {model.config.residual.kind} defines the model for {ranks} tensor ranks, and tp={mesh.tp} does "
            f"not divide that; use tp={fits}, or train another model with as many ranks as tp"
        )
    here = (ranks or 1) // mesh.tp
    if here % mesh.cp and mesh.cp % here and exchanged(model, mesh):
        raise ValueError(
            f"residual {model.config.residual.kind} makes {here} streams on each of tp={mesh.tp} tensor ranks, and "
            f"cp={mesh.cp} neither divides that nor is a multiple of it; use cp=1"
        )


def exchanged(model: LM, mesh: MeshConfig) -> set[nn.Module]:
    """The parts of all layers whose heads context ranks exchange for tokens."""
    ulysses = mesh.context == "ulysses"
    layers = [layer.mixer for layer in model.blocks if ulysses or not layer.mixer.branch.mixer.in_place]
    return {part for layer in layers for part in layer.modules()}


def split_axes(model: LM, mesh: MeshConfig, key: str) -> Iterator[tuple[str, Axis]]:
    """(parameter's name, axis) of every dimension that the ranks of `key` split: tp, ep, or cp with tp."""
    parts = exchanged(model, mesh) if key == "cp" else None
    for name, module, _, spec in named_specs(model):
        # Experts that every token takes are whole on each rank.
        shared = key == "etp" and {axis.name for axis in named_axes(spec)}.isdisjoint(EXPERT_AXES)
        if not shared and (parts is None or module in parts):
            yield from ((name, axis) for axis in named_axes(spec) if axis.name in SPLIT[key])


def uneven(model: LM, mesh: MeshConfig, key: str) -> list[tuple[str, Axis]]:
    """(parameter's name, axis) of what does not split evenly over the ranks of `key`: tp, ep, or cp with tp."""
    count = mesh.tp * mesh.cp if key == "cp" else getattr(mesh, key)
    return [(name, axis) for name, axis in split_axes(model, mesh, key) if not fits(axis, count)]


def nearest(model: LM, mesh: MeshConfig, key: str) -> str:
    """The way out that a refusal names, such as "ep=2" or "ep=2 with dp=2": the largest smaller degree of `key` that
    splits evenly; one after which nothing is uneven, if there is one, with as few changes as that takes."""
    axes = {axis for _, axis in split_axes(model, mesh, key)}
    times = mesh.tp if key == "cp" else 1
    smaller = range(getattr(mesh, key) - 1, 0, -1)
    even = [degree for degree in smaller if all(fits(axis, degree * times) for axis in axes)]
    alone = next((degree for degree in even if holds(model, mesh, {key: degree})), None)
    if alone is None or alone == 1:
        for degree in even[: even.index(1)]:
            data = data_ranks(mesh, key, degree)
            if holds(model, mesh, {key: degree, **data}):
                return f"{key}={degree} with {', '.join(f'{name}={size}' for name, size in data.items())}"
    return f"{key}={alone or even[0]}"


def data_ranks(mesh: MeshConfig, key: str, degree: int) -> dict[str, int | str]:
    """By its key in the mesh: about as many data ranks as there are, from which the expert ranks can be borrowed when
    `key` has this degree."""
    ep, etp, tp, cp = (degree if name == key else getattr(mesh, name) for name in ("ep", "etp", "tp", "cp"))
    sharded = mesh.shard > 1 and mesh.replicate == 1
    had, kept = (mesh.shard, mesh.replicate) if sharded else (mesh.replicate, mesh.shard)
    step = ep * etp // math.gcd(ep * etp, kept * tp * cp)
    size = max(had // step, 1) * step
    if mesh.hsdp:
        return {"hsdp": f"{kept}x{size}" if sharded else f"{size}x{kept}"}
    return {"fsdp" if sharded else "dp": size}


def holds(model: LM, mesh: MeshConfig, changes: dict[str, int | str]) -> bool:
    """Whether there can be a mesh with these changes, and the model splits evenly over it."""
    try:
        other = dataclasses.replace(mesh, **changes)  # type: ignore[arg-type]
    except ValueError:
        return False
    return not any(uneven(model, other, split) for split in SPLIT)


def axes_of(module: nn.Module) -> set[str]:
    """The names of all axes that a module's parameters declare."""
    return {axis.name for _, _, _, spec in named_specs(module) for axis in named_axes(spec)}


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


def refuse_widths(model: LM, mesh: MeshConfig) -> None:
    """Ranks that share an expert split its width, and nothing else may."""
    if mesh.etp == 1:
        return
    if model.blocks[0].mixer.connection.by_rank is not None:
        raise ValueError(
            f"etp is {mesh.etp} and residual {model.config.residual.kind} gives each tensor rank a part of an expert's "
            "width; use etp=1"
        )
    for name, _, _, spec in named_specs(model):
        names = {axis.name for axis in named_axes(spec)}
        if not names.isdisjoint(EXPERT_AXES) and names.isdisjoint(EXPERT_WIDTHS):
            raise ValueError(
                f"etp is {mesh.etp}, and {name} names no axis of an expert's width that it could split; use etp=1, or "
                f"name it {EXPERT_WIDTHS[0]}"
            )


def refuse_uneven(model: LM, mesh: MeshConfig, key: str) -> None:
    """Whole heads, rows of the vocabulary and so on for each tensor rank, and whole experts for each expert rank."""
    wrong = uneven(model, mesh, key)
    if not wrong:
        return
    name, axis = wrong[0]
    degree = getattr(mesh, key)
    # More heads than there are might break what their mixer asks of them.
    free = axis.name not in HEAD_AXES and all(other == axis for _, other in wrong)
    setting = setting_of(model.config, name, axis.groups) if free else None
    raise ValueError(
        f"{key} is {degree}, which does not divide the {axis.groups} {axis.name} of {name}; "
        f"use {nearest(model, mesh, key)}"
        + (f", or {setting}={math.ceil(axis.groups / degree) * degree}" if setting else "")
    )


def setting_of(config: LMConfig, name: str, groups: int) -> str | None:
    """The config's key whose value a parameter has so many groups by, if it is the only one that is this number."""
    place, index, part, *_ = name.split(".") if name.startswith("layers.") else ("", "", "")
    owner = getattr(config.expanded[int(index)], part) if place else config
    found = [f.name for f in dataclasses.fields(owner) if getattr(owner, f.name) == groups]
    return f"{part}.{found[0]}" if place and len(found) == 1 else found[0] if len(found) == 1 else None


def refuse_heads(model: LM, mesh: MeshConfig) -> None:
    """Ulysses gives each context rank whole heads of what tensor ranks hold."""
    in_place = dataclasses.replace(mesh, context="ring") if mesh.cp > 1 else mesh
    ring = ", or context=ring, which leaves heads whole" if not uneven(model, in_place, "cp") else ""
    for name, axis in uneven(model, mesh, "cp"):
        raise ValueError(
            f"cp={mesh.cp} with tp={mesh.tp} needs {mesh.tp * mesh.cp} to divide the {axis.groups} {axis.name} of "
            f"{name}; use {nearest(model, mesh, 'cp')}{ring}"
        )
