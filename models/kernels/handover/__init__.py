"""The write of one sublayer and the read of the next: streams are read once for both (arXiv 2409.19606, 2503.14125,
2512.24880)."""

from collections.abc import Callable
from types import MappingProxyType
from typing import Any, ClassVar

from models.kernels.handover.reference import handover
from models.kernels.op import Op


class Handover(Op):
    """(streams [..., R, D], m [..., R, R], out [..., P, D], b [..., P, R], moves, reading, settle, mix) ->
    (streams [..., R, D], read [..., Q, D], kept); see `reference`."""

    name = "handover"
    within = ("stream_mix", "normed_product")
    reference: ClassVar[Callable[..., Any]] = staticmethod(handover)
    others = MappingProxyType({"triton": "models.kernels.handover.triton:handover"})
