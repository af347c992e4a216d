"""torch.compile, a layer at a time.

Layers of one config share one compilation, so that it takes as long for 4 layers as for 96. What surrounds a layer
stays eager: FSDP2's hooks, pipelines, the embedding and the loss, which is chunked.
"""

import warnings

import torch

from models.lm import LM
from parallel.mesh import MeshConfig

# Of one layer: with and without gradients, and micro-batches of several sizes.
VARIANTS = 8


def compile_layers(model: LM) -> None:
    """Compile what every layer computes. Names, state dicts and hooks stay as they are."""
    from torch._dynamo import config as dynamo

    # Layers of different kinds are versions of the same code to torch, which gives up at a fixed number of versions and
    # goes on uncompiled unless it is told otherwise.
    dynamo.recompile_limit = max(dynamo.recompile_limit, VARIANTS * len(model.config.expanded))
    dynamo.accumulated_recompile_limit = max(dynamo.accumulated_recompile_limit, dynamo.recompile_limit)
    dynamo.fail_on_recompile_limit_hit = True
    # torch looks at the gradient of what enters a layer while it compiles it, and warns of that itself.
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
    for layer in model.blocks:
        layer.run = torch.compile(layer.run, dynamic=False)


def refuse_schedule(mesh: MeshConfig) -> None:
    """Raise ValueError for schedules that take the gradients of inputs before those of weights. A compiled layer is one
    node of the graph, from which torch's pipelines then lose gradients without an error (docs/experiments.md)."""
    if mesh.splits_backward:
        raise ValueError(
            f"layers are to be compiled under schedule {mesh.schedule}, which splits the backward pass, and gradients "
            "of compiled layers would be lost; use schedule interleaved or 1f1b, or leave compile out"
        )


def refuse_compile(device: str) -> None:
    """Raise ValueError where nothing can be compiled: on a CPU it takes a C++ compiler."""
    if device != "cpu":
        return
    # The import takes seconds.
    from torch._inductor import cpp_builder, exc

    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler as error:
        raise ValueError(
            "there is no C++ compiler, which torch.compile needs on a CPU; install g++, or leave compile out"
        ) from error
