"""Picks of experts put together in plain torch.

Shape suffixes: N tokens, D width, K picks of a token, P picks that are made, C constants, S slots of a token.
"""

from typing import NamedTuple, Self

import torch
from torch import Tensor


class Picks(NamedTuple):
    """The token and the pick of each pick that is made, in order. slot: its number among its token's that are. slots:
    S, the most that a token makes."""

    token_P: Tensor
    pick_P: Tensor
    slot_P: Tensor
    slots: int

    @classmethod
    def of(cls, keep_NK: Tensor | None) -> Self | None:
        """Those that are kept; None for all. How many they are is read on the host, since it sets the shape; on the
        meta device, which knows no numbers, they are all."""
        if keep_NK is None or keep_NK.is_meta:
            return None
        token_P, pick_P = keep_NK.nonzero().unbind(1)
        slot_P = (keep_NK.cumsum(1) - 1)[token_P, pick_P]
        return cls(token_P, pick_P, slot_P, int(slot_P.max()) + 1 if len(slot_P) else 1)


def weighted_picks(y_PD: Tensor, weights_NK: Tensor, picks: Picks | None) -> Tensor:
    """`out_n = sum_k weight_nk y_nk`, [N, D], at least float32. y: of each pick, in order."""
    wide_PD = y_PD.to(torch.promote_types(y_PD.dtype, torch.float32))
    if picks is None:
        return (wide_PD.view(*weights_NK.shape, y_PD.shape[1]) * weights_NK[..., None]).sum(1)
    weighted_PD = wide_PD * weights_NK[picks.token_P, picks.pick_P][:, None]
    zeros = weighted_PD.new_zeros(len(weights_NK) * picks.slots, weighted_PD.shape[1])
    return (
        zeros.index_copy(0, picks.token_P * picks.slots + picks.slot_P, weighted_PD)
        .unflatten(0, (-1, picks.slots))
        .sum(1)
    )


def combine(
    y_PD: Tensor,
    weights_NK: Tensor,
    keep_NK: Tensor | None,
    x_ND: Tensor,
    own_N1: Tensor,
    take_NC: Tensor,
    value_CD: Tensor,
) -> Tensor:
    """The weighted picks, with own x and take value added, in the type of x. keep None is all; C may be 0."""
    wide = torch.promote_types(x_ND.dtype, torch.float32)
    out_ND = weighted_picks(y_PD, weights_NK, Picks.of(keep_NK)) + own_N1 * x_ND.to(wide)
    return (out_ND + take_NC @ value_CD.to(wide)).to(x_ND.dtype)
