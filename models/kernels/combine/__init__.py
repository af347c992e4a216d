"""What a token's experts made, put together, with what costs nothing: copies of the token and constants (MoE++, arXiv
2410.07348)."""

from collections.abc import Callable
from types import MappingProxyType
from typing import Any, ClassVar

from models.kernels.combine.reference import combine
from models.kernels.op import Op


class Combine(Op):
    """(y [P, D], weights [N, K], places [N, K], free or None) -> [N, D]; see `reference`."""

    name = "combine"
    reference: ClassVar[Callable[..., Any]] = staticmethod(combine)
    others = MappingProxyType({"triton": "models.kernels.combine.triton:combine"})
