"""Tokens' rows where their experts read them."""

from collections.abc import Callable
from types import MappingProxyType
from typing import Any, ClassVar

from models.kernels.op import Op
from models.kernels.permute.reference import permute


class Permute(Op):
    """(x [N, D], places [N, K], P) -> [P, D]; see `reference`."""

    name = "permute"
    reference: ClassVar[Callable[..., Any]] = staticmethod(permute)
    others = MappingProxyType({"triton": "models.kernels.permute.triton:permute"})
