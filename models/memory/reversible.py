"""Nothing of a layer is kept: its input is computed back from its output, through residuals that can be undone."""

import dataclasses
import itertools
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from models.config import LMConfig
from models.limits import above_zero
from models.memory.base import MemoryConfig
from models.memory.undone import DRIFT, Chain, Undone

if TYPE_CHECKING:
    from models.layer import Layer
    from models.lm import LM


@dataclasses.dataclass(frozen=True)
class ReversibleConfig(MemoryConfig, kind="reversible"):
    """Layers are undone (RevNet, arXiv 1707.04585): memory does not grow with depth, for one more forward pass. Takes a
    residual that can be undone; on its grid the states are rebuilt bit for bit.

    alarm: without a grid, the relative error of a rebuilt state beyond which a run warns, and again at each tenfold.
    """

    alarm: float = 1e-3

    def __post_init__(self) -> None:
        above_zero(self, "alarm", hint=", and 1e-3 is usual")

    @property
    def splits_backward(self) -> bool:
        return False

    @property
    def uncompiled(self) -> str:
        return "which may round otherwise when they are run again with gradients"

    def refuse(self, model: "LM") -> None:
        residual = model.config.residual
        if not residual.steps:
            fits = type(residual).such_as(lambda kind: bool(kind.steps))
            raise ValueError(
                f"memory {self.kind} undoes layers, and residual {residual.kind} cannot be undone; use one that "
                f"can{fits}, or memory full"
            )
        for layer in model.blocks:
            depth = layer.depth
            if depth.peeks or depth.reads or depth.writes or depth.has_losses:
                raise ValueError(
                    f"memory {self.kind} undoes layers from their outputs, and depth {model.config.depth.kind} looks "
                    "at their inputs; use depth full, or memory full"
                )
            earlier: set[str] = set()
            for step in residual.steps:
                parts = [getattr(layer, role) for role in step]
                if crossing := earlier & {name for part in parts for name in part.branch.reads}:
                    raise ValueError(
                        f"memory {self.kind} undoes a layer's branches in turn, and one of layer {layer.index} reads "
                        f"{sorted(crossing)[0]!r}, which another writes in the same layer; use memory full"
                    )
                earlier |= {entry.name for part in parts for entry in part.branch.writes}

    def keepers(self, layers: "list[Layer]", config: LMConfig) -> list[Undone]:
        made: list[Undone] = []
        for _, group in itertools.groupby(enumerate(layers), key=lambda item: item[1].index - item[0]):
            chain, count = self.chain(config.residual.steps, config.residual.exact), len(list(group))
            made += [self.keeper(chain, place, last=place == count - 1) for place in range(count)]
        return made

    def chain(self, steps: tuple[tuple[str, ...], ...], exact: bool) -> Chain:
        return Chain(steps, exact)

    def keeper(self, chain: Chain, index: int, last: bool) -> Undone:
        return Undone(chain, index, last)

    def report(self, stats: Mapping[str, Tensor]) -> dict[str, float]:
        """{"drift": relative error of the state that was rebuilt last, of the stage where it is largest}."""
        drifts = [x.double() for name, x in stats.items() if name.endswith(f".{DRIFT}")]
        return {"drift": max(math.sqrt(error / max(size, 1e-300)) for error, size in drifts)} if drifts else {}

    def warning(self, report: Mapping[str, float], warned: Mapping[str, float], exact: bool) -> str | None:
        drift, alarm = report.get("drift", 0.0), 0.0 if exact else self.alarm
        if drift <= max(alarm, 10 * warned.get("drift", 0.0)):
            return None
        if exact:
            return (
                f"memory {self.kind} rebuilt a state with a relative error of {drift:.1e}, and on a grid there is "
                "none: a sum over ranks did not come out as in the forward pass, or a stream has left the grid's "
                "range; look for a collective that does not repeat itself, use fewer grid_bits, or memory full"
            )
        return (
            f"memory {self.kind} rebuilt a state with a relative error of {drift:.1e}, above its alarm of "
            f"{self.alarm:.1e}, and single gradients may be tens of times as wrong; give the residual a grid "
            "(grid_bits 14 suits float32), or use memory full"
        )
