"""Sinkhorn-Knopp: from logits to doubly stochastic matrices (mHC, arXiv 2512.24880, section 4.2)."""

from collections.abc import Callable
from types import MappingProxyType
from typing import Any, ClassVar

from models.kernels.op import Op
from models.kernels.sinkhorn.reference import sinkhorn


class Sinkhorn(Op):
    """(logits [..., N, N], iterations) -> [..., N, N]; see `reference`."""

    name = "sinkhorn"
    reference: ClassVar[Callable[..., Any]] = staticmethod(sinkhorn)
    others = MappingProxyType({"triton": "models.kernels.sinkhorn.triton:sinkhorn"})
