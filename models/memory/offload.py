"""What autograd saves of a layer waits in host memory (Ren et al., arXiv 2101.06840, do so with other tensors)."""

import dataclasses
import weakref
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from models.config import LMConfig, default
from models.keeper import Keeper
from models.limits import at_least
from models.memory.base import MemoryConfig
from models.memory.host import Host, host_of
from models.memory.sizes import storage
from models.memory.undone import visible
from models.state import Side, State

if TYPE_CHECKING:
    from models.layer import Extras, Layer
    from models.lm import LM


@dataclasses.dataclass(frozen=True)
class OffloadConfig(MemoryConfig, kind="offload"):
    """Saved tensors are copied to pinned host memory beside the computation, and come back while the gradients of the
    layer behind are computed. Parameters stay. On a CPU nothing is gained.

    of: what is kept in the first place: none moves all that autograd saves, full the state in front of each layer.
    min_bytes: smaller tensors stay where they are.
    """

    of: MemoryConfig = default(MemoryConfig, "none")
    min_bytes: int = 65536

    def __post_init__(self) -> None:
        at_least(self, 0, "min_bytes")
        if not self.of.saves:
            others = MemoryConfig.such_as(lambda kind: kind.saves)
            raise ValueError(
                f"of is {self.of.kind}, which has autograd save nothing to move; use one that does{others}"
            )

    def refuse(self, model: "LM") -> None:
        self.of.refuse(model)

    def keepers(self, layers: "list[Layer]", config: LMConfig) -> list[Keeper]:
        trail = Trail()
        inner = self.of.keepers(layers, config)
        return [Offloaded(keeper, trail, not index, self.min_bytes) for index, keeper in enumerate(inner)]


class Trail:
    """The load that a stage's layers made last in a forward pass."""

    def __init__(self) -> None:
        self.last: weakref.ref[Load] | None = None
        self.host: Host | None = None

    def load(self, first: bool, device: torch.device) -> "Load":
        """A new one, behind the last unless it is the `first` of a pass."""
        if self.host is None:
            self.host = host_of(device)
        load = Load(self.host, None if first else self.last)
        self.last = weakref.ref(load)
        return load


class Load:
    """What one layer's forward pass saved. It knows those of the layers before and behind, while those are there."""

    def __init__(self, host: Host, before: "weakref.ref[Load] | None") -> None:
        self.host, self.waiting = host, list[Tensor]()
        self.here: list[Tensor] | None = None
        self.came: object = None
        self.used = False
        self.before = before
        if before is not None and (other := before()) is not None:
            other.behind = weakref.ref(self)
        self.behind: weakref.ref[Load] | None = None
        self._known: dict[object, tuple[StorageWeakRef, int]] = {}

    def put(self, x: Tensor) -> int:
        """The number of x, which several operations may have saved."""
        key = (storage(x), x.storage_offset(), x.shape, x.stride(), x.dtype)
        # What has been freed since is another tensor, at whose address a new one may lie.
        alive, number = self._known.get(key, (None, 0))
        if alive is None or alive.expired():
            number = len(self.waiting)
            self._known[key] = StorageWeakRef(x.untyped_storage()), number
            self.waiting.append(self.host.out(x))
        return number

    def get(self, number: int) -> Tensor:
        if not self.used:
            self.used = True
            if self.behind is not None and (behind := self.behind()) is not None:
                behind.leave()
            self.fetch()
            if self.before is not None and (before := self.before()) is not None:
                before.fetch()
        assert self.here is not None
        # For the copies of this layer, and not for those of the layer in front, which are under way as well.
        self.host.arrive(self.came)
        return self.here[number]

    def fetch(self) -> None:
        if self.here is None:
            self.here = [self.host.back(x) for x in self.waiting]
            self.came = self.host.mark()

    def leave(self) -> None:
        """Free what came back. A second backward pass fetches it again."""
        self.here, self.used = None, False


class Offloaded(Keeper):
    def __init__(self, inner: Keeper, trail: Trail, first: bool, min_bytes: int) -> None:
        self.inner, self.trail, self.first, self.min_bytes = inner, trail, first, min_bytes

    def run(self, layer: "Layer", state: State, side: Side, local: Side) -> "tuple[State, Extras]":
        load = self.trail.load(self.first, side.tokens.device)
        stays = {storage(x) for x in visible(layer)}

        def pack(x: Tensor) -> Tensor | int:
            return x if x.nbytes < self.min_bytes or storage(x) in stays else load.put(x)

        def unpack(packed: Tensor | int) -> Tensor:
            return load.get(packed) if isinstance(packed, int) else packed

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            return self.inner.run(layer, state, side, local)
