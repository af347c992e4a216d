"""What hyper-connections read from their streams, and what they write to them (arXiv 2409.19606, 2503.14125,
2512.24880)."""

from collections.abc import Callable
from types import MappingProxyType
from typing import Any, ClassVar

from models.kernels.op import Op
from models.kernels.stream_mix.reference import stream_mix


class StreamMix(Op):
    """(streams [..., R, D], m [..., R, Q], out and b, or None twice) -> [..., Q, D]; see `reference`."""

    name = "stream_mix"
    reference: ClassVar[Callable[..., Any]] = staticmethod(stream_mix)
    others = MappingProxyType({"triton": "models.kernels.stream_mix.triton:stream_mix"})
