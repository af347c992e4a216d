"""A step of a stream that can be undone, and the norm behind it (arXiv 1707.04585, 2512.02056)."""

from collections.abc import Callable
from types import MappingProxyType
from typing import Any, ClassVar

from models.kernels.grid_add.reference import grid_add
from models.kernels.op import Op


class GridAdd(Op):
    """(x [..., D], added, factor, bits or None, norm or None) -> (sum, normed or None); see `reference`."""

    name = "grid_add"
    reference: ClassVar[Callable[..., Any]] = staticmethod(grid_add)
    others = MappingProxyType({"triton": "models.kernels.grid_add.triton:grid_add"})
