"""Places in queues: what experts' capacity and the order of their rows are made of."""

from collections.abc import Callable
from types import MappingProxyType
from typing import Any, ClassVar

from models.kernels.op import Op
from models.kernels.queues.reference import queues


class Queues(Op):
    """(queue [R, M], number of queues) -> (place [R, M], counts [R, Q]); see `reference`."""

    name = "queues"
    reference: ClassVar[Callable[..., Any]] = staticmethod(queues)
    others = MappingProxyType({"triton": "models.kernels.queues.triton:queues"})
