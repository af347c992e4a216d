"""Another kind of memory for each kind of layer."""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

from torch import Tensor

from models.config import LMConfig, default
from models.keeper import Keeper
from models.memory.base import MemoryConfig

if TYPE_CHECKING:
    from models.layer import Layer
    from models.lm import LM


@dataclasses.dataclass(frozen=True)
class ByLetterConfig(MemoryConfig, kind="by_letter"):
    """Layers are kept as the letter of `model.pattern` says that made them.

    letters: the memory of each letter. others: of those that are not among them.
    """

    letters: dict[str, MemoryConfig]
    others: MemoryConfig = default(MemoryConfig, "none")

    example = MappingProxyType({"letters": {"A": {"kind": "full"}}})
    by_layer = False

    def __post_init__(self) -> None:
        for kind in self.kinds_used():
            if not kind.by_layer:
                others = MemoryConfig.such_as(lambda other: other.by_layer)
                raise ValueError(f"memory {kind.kind} is for all layers at once; use one for single layers{others}")

    def kinds_used(self) -> list[MemoryConfig]:
        return [*self.letters.values(), self.others]

    @property
    def splits_backward(self) -> bool:
        return all(kind.splits_backward for kind in self.kinds_used())

    @property
    def ahead(self) -> bool:
        return any(kind.ahead for kind in self.kinds_used())

    @property
    def uncompiled(self) -> str:
        return next((kind.uncompiled for kind in self.kinds_used() if kind.uncompiled), "")

    def refuse(self, model: "LM") -> None:
        known = model.config.layers
        if unused := [letter for letter in self.letters if letter not in known]:
            raise ValueError(
                f"letters has {unused[0]!r}, which is no layer of the pattern {model.config.pattern!r}; use "
                f"{', '.join(sorted(known))}, or take it out"
            )
        for kind in self.kinds_used():
            kind.refuse(model)

    def keepers(self, layers: "list[Layer]", config: LMConfig) -> list[Keeper]:
        letters = config.pattern * config.repeat
        kinds = {layer.index: self.letters.get(letters[layer.index], self.others) for layer in layers}
        made: dict[int, Keeper] = {}
        # Letters of one memory are kept together, as layers that follow one another and are undone.
        for kind in dict.fromkeys(kinds.values()):
            own = [layer for layer in layers if kinds[layer.index] == kind]
            made |= zip((layer.index for layer in own), kind.keepers(own, config), strict=True)
        return [made[layer.index] for layer in layers]

    def report(self, stats: Mapping[str, Tensor]) -> dict[str, float]:
        return {name: value for kind in self.kinds_used() for name, value in kind.report(stats).items()}

    def warning(self, report: Mapping[str, float], warned: Mapping[str, float], exact: bool) -> str | None:
        sentences = (kind.warning(report, warned, exact) for kind in self.kinds_used())
        return next((sentence for sentence in sentences if sentence), None)
