"""Whether a model fits a mesh: every refusal before anything is allocated, in one sentence with the way out."""

import torch

from models.config import LMConfig
from models.lm import LM
from models.params import Axis, named_specs
from parallel import pipeline
from parallel.mesh import MeshConfig
from parallel.shards import fits, refuse_uneven


def refuse(config: LMConfig, mesh: MeshConfig) -> None:
    """Raise ValueError with the first reason why the mesh cannot hold the model."""
    with torch.device("meta"):
        model = LM(config)
    refuse_uneven(model, {"tp": mesh.tp, "ep": mesh.ep})
    if mesh.pp > 1:
        pipeline.refuse(mesh, len(config.expanded), micro_batches=2 * mesh.pp)
    if mesh.cp > 1:
        refuse_heads(model, mesh)
    if mesh.ep > 1 and not any(
        axis.name == "experts" for _, _, _, spec in named_specs(model) for axis in spec.axes if isinstance(axis, Axis)
    ):
        raise ValueError(f"ep is {mesh.ep} and the model has no experts; use ep=1, or an ffn with experts such as moe")


def refuse_heads(model: LM, mesh: MeshConfig) -> None:
    """Ulysses gives each context rank whole heads of what tensor ranks hold."""
    degree = mesh.tp * mesh.cp
    for name, _, _, spec in named_specs(model):
        for axis in spec.axes:
            if isinstance(axis, Axis) and axis.name in ("heads", "kv_heads") and not fits(axis, degree):
                near = max(n for n in range(1, mesh.cp + 1) if fits(axis, mesh.tp * n))
                raise ValueError(
                    f"cp={mesh.cp} with tp={mesh.tp} needs {degree} to divide the {axis.groups} {axis.name} of {name}; "
                    f"use cp={near}"
                )
