"""Everything that autograd saves is kept."""

import dataclasses
from typing import TYPE_CHECKING

from models.config import LMConfig
from models.keeper import Keeper
from models.memory.base import MemoryConfig

if TYPE_CHECKING:
    from models.layer import Layer


@dataclasses.dataclass(frozen=True)
class NoneConfig(MemoryConfig, kind="none"):
    """Nothing is computed twice: the fastest, while memory lasts."""

    saves = True
    once = True

    def keepers(self, layers: "list[Layer]", config: LMConfig) -> list[Keeper]:
        return [Keeper() for _ in layers]
