"""Whether a branch's sum can be under way beside the next branch: see `parallel.whole_stream`."""

from collections.abc import Iterator

from torch import nn

from models.beside import Beside
from models.branches import FFNBranch, MixerBranch
from models.depth.base import DepthControl
from models.lm import LM
from models.memory.base import MemoryConfig
from models.norms.base import Placement
from models.slots import Mixer, ResidualConfig
from models.state import Layout
from models.sublayer import Sublayer
from parallel.mesh import MeshConfig


def refuse_overlap(model: LM, mesh: MeshConfig, memory: MemoryConfig, compile: bool) -> None:
    """Raise ValueError with the first thing that stands against it, and the way out."""
    if not mesh.overlap:
        return
    for what, rest in reasons(model, mesh, memory, compile):
        raise ValueError(f"overlap is true, and {what}; {rest}, or leave overlap out")


def reasons(model: LM, mesh: MeshConfig, memory: MemoryConfig, compile: bool) -> Iterator[tuple[str, str]]:
    """What stands against it, and what to change."""
    config = model.config
    if mesh.tp == 1:
        yield "tp is 1: there are no sums over tensor ranks", "give tp too"
    if not config.residual.lands:
        others = ResidualConfig.such_as(lambda kind: kind.lands)
        yield f"residual {config.residual.kind} adds a branch's output at once", f"use another residual{others}"
    if not memory.once:
        yield f"memory {memory.kind} runs parts of layers again, for which nothing is under way", "use memory none"
    if compile:
        yield "compiled layers cannot leave a sum under way", "leave train.compile out"
    for layer in model.blocks:
        if type(layer.depth).forward is not DepthControl.forward:
            yield f"depth {config.depth.kind} works on the rank's own tokens, and here they are all", "use depth full"
        for name, part in (("mixer", layer.mixer), ("ffn", layer.ffn)):
            if type(part.placement).after is not Placement.after:
                yield f"layer {layer.index} has a norm behind its {name}, which needs the whole sum", "use norm pre"
            if not isinstance(part.scaling, nn.Identity):
                yield f"scaling {config.scaling.kind} multiplies a branch's output", "use scaling none"
            if type(part.beside) is not Beside:
                yield f"shortcut {config.shortcut.kind} adds to a branch's output", "use shortcut none"
            if by_token(part):
                kind = getattr(config.expanded[layer.index], name).kind
                yield f"{name} {kind} keeps something of the rank's own tokens beside its output", f"use another {name}"


def by_token(part: Sublayer[MixerBranch] | Sublayer[FFNBranch]) -> bool:
    """Whether a branch computes something of each token by itself that others are to have, or after its sum."""
    if any(entry.layout is Layout.TOKENS for entry in part.branch.writes):
        return True
    if isinstance(part.branch, FFNBranch):
        return False
    own = type(part.branch.mixer)
    return own.own_tokens is not Mixer.own_tokens or own.finish is not Mixer.finish
