"""Weighted sums over depth: every way that a layer mixes the outputs before it (MUDD, arXiv 2502.12170; DenseFormer,
arXiv 2402.02622)."""

from collections.abc import Callable
from types import MappingProxyType
from typing import Any, ClassVar

from models.kernels.depth_mix.reference import depth_mix
from models.kernels.op import Op


class DepthMix(Op):
    """(J sources [..., D], oldest first, weights [..., C, J] or [C, J]) -> C tensors [..., D]; see `reference`."""

    name = "depth_mix"
    reference: ClassVar[Callable[..., Any]] = staticmethod(depth_mix)
    others = MappingProxyType({"triton": "models.kernels.depth_mix.triton:depth_mix"})
