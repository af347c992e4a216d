"""A norm and the narrow product behind it, in one read: what hyper-connections compute their matrices from."""

from collections.abc import Callable
from types import MappingProxyType
from typing import Any, ClassVar

from models.kernels.normed_product.reference import normed_product
from models.kernels.op import Op


class NormedProduct(Op):
    """(x [..., D], columns [D, K], weight [D], bias [D] or None, eps) -> [..., K]; see `reference`."""

    name = "normed_product"
    reference: ClassVar[Callable[..., Any]] = staticmethod(normed_product)
    others = MappingProxyType({"triton": "models.kernels.normed_product.triton:normed_product"})
