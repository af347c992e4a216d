"""Where an optimiser's state lives: on the device, or in host memory but for the parameters that are being updated."""

import math
from collections.abc import Callable, Iterator

from torch import Tensor
from torch.distributed.tensor import DTensor

from models.memory.host import Host
from parallel.gradients import Held

State = dict[str, Tensor]
First = Callable[[Held], State]


class States:
    """On the device of the parameters."""

    def __init__(self) -> None:
        self._kept: dict[Tensor, State] = {}

    def of(self, held: Held, first: First) -> State:
        """The state of a parameter, to be read and written. first: makes it where there is none."""
        if held.parameter not in self._kept:
            self._kept[held.parameter] = first(held)
        return self._kept[held.parameter]

    def rounds(self, parameters: list[Held], first: First) -> Iterator[list[Held]]:
        """The parameters in parts, equal ones on all ranks of a pipeline stage; the state of each part is on the device
        while it is updated."""
        yield parameters


class HostStates(States):
    """In host memory (as ZeRO-Offload's, arXiv 2101.06840, but that the device updates): while one part is updated the
    state of the next one comes, and that of the last one leaves.

    mib: of parameters that make a part, as far as whole ones allow.
    """

    def __init__(self, host: Host, mib: float) -> None:
        super().__init__()
        self._host, self._bytes = host, mib * 2**20
        self._here: dict[Tensor, State] = {}

    def of(self, held: Held, first: First) -> State:
        if held.parameter in self._here:
            return self._here[held.parameter]
        self._host.settle()
        return self._waiting(held, first)

    def _waiting(self, held: Held, first: First) -> State:
        if held.parameter not in self._kept:
            # Counts stay: each is one number, which the update wants on the device.
            state = first(held)
            self._kept[held.parameter] = {key: self._host.out(x) if x.shape else x for key, x in state.items()}
        return self._kept[held.parameter]

    def rounds(self, parameters: list[Held], first: First) -> Iterator[list[Held]]:
        parts = list(self._parts(parameters))
        coming, came = self._fetch(parts[0], first) if parts else ({}, None)
        for index, part in enumerate(parts):
            self._host.arrive(came)  # for this part, and not for the one before it, which is leaving
            self._here = coming
            coming, came = self._fetch(parts[index + 1], first) if index + 1 < len(parts) else ({}, None)
            yield part
            self._send()
        self._here = {}

    def _fetch(self, part: list[Held], first: First) -> tuple[dict[Tensor, State], object]:
        """The part's state, and the mark to wait for. Copies go in the order of the calls, so that it comes into the
        memory of what has left by then."""
        waiting = {held.parameter: self._waiting(held, first) for held in part}
        coming: dict[Tensor, State] = {
            parameter: {key: self._host.back(x) if x.shape else x for key, x in state.items()}
            for parameter, state in waiting.items()
        }
        return coming, self._host.mark()

    def _send(self) -> None:
        for parameter, state in self._here.items():
            for key, x in state.items():
                if x.shape:
                    self._host.refill(self._kept[parameter][key], x)

    def _parts(self, parameters: list[Held]) -> Iterator[list[Held]]:
        part: list[Held] = []
        size = 0.0
        for held in parameters:
            own = share(held) * held.parameter.element_size()
            if part and size + own > self._bytes:
                yield part
                part, size = [], 0.0
            part.append(held)
            size += own
        if part:
            yield part


def share(held: Held) -> float:
    """Elements of a parameter per rank, the same on all ranks of a pipeline stage whatever each of them holds."""
    ranks = held.shard.pieces
    if isinstance(held.parameter, DTensor):
        ranks *= held.parameter.device_mesh.size(-1)
    return math.prod(held.shard.spec.shape) / ranks
