"""Picks of experts put together in plain torch.

Shape suffixes: N tokens, D width, K picks of a token, P picks that are made, C constants.
"""

from typing import NamedTuple

from torch import Tensor

from models.kernels.picks import of_picks
from models.params import upcast


class Free(NamedTuple):
    """Adds `own x + take value` to a token. C may be 0."""

    x_ND: Tensor
    own_N1: Tensor
    take_NC: Tensor
    value_CD: Tensor


def combine(y_PD: Tensor, weights_NK: Tensor, places_NK: Tensor, free: Free | None = None) -> Tensor:
    """`out_n = sum_k weight_nk y[place_nk]` over the picks that are made, and what is free: [N, D], in the type of y.

    places: below P each is of one pick; -1 of one that is not made.
    """
    out_ND = (upcast(of_picks(y_PD, places_NK)) * weights_NK[..., None]).sum(1)
    if free is not None:
        out_ND = out_ND + free.own_N1 * upcast(free.x_ND) + free.take_NC @ upcast(free.value_CD)
    return out_ND.to(y_PD.dtype)
