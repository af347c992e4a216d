"""How what is read from streams depends on them.

Shape suffixes: `...` tokens, R rows (streams, or their fractions), Q rows read, D width, K logits.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

from torch import Tensor

from models.state import State

Squash = Literal["identity", "tanh", "sigmoid"]
# From the logits, if there are any, to the weights [..., R, Q] of what is read, and what the write after it needs.
Settle = Callable[[Tensor | None], tuple[Tensor, State]]


class Reading(NamedTuple):
    """Logits are norm(row) columns, [..., R, K], or flat, of all rows as one vector, [..., K]. The weight of row r in
    read q is that of logit `stride q` of the row, or flat of logit `stride r`, with one q: sigmoid(static + scale
    logit), or static + scale squash(logit). A bias makes the norm LayerNorm, without one it is RMSNorm. product:
    `models.kernels.normed_product`."""

    product: Callable[..., Tensor]
    columns_DK: Tensor
    weight_D: Tensor
    bias_D: Tensor | None
    eps: float
    static_RQ: Tensor
    scale_1: Tensor
    squash: Squash
    stride: int
    flat: bool = False

    def logits(self, rows_RD: Tensor) -> Tensor:
        seen = rows_RD.flatten(-2) if self.flat else rows_RD
        return self.product(seen, self.columns_DK, self.weight_D, self.bias_D, self.eps)
