"""Picks of experts put together in plain torch.

Shape suffixes: N tokens, D width, K picks of a token, P picks that are made, C constants, S slots of a token.
"""

from torch import Tensor

from models.kernels.picks import Picks
from models.params import upcast


def weighted_picks(y_PD: Tensor, weights_NK: Tensor, picks: Picks | None) -> Tensor:
    """`out_n = sum_k weight_nk y_nk`, [N, D], at least float32. y: of each pick, in order."""
    wide_PD = upcast(y_PD)
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
    picks: Picks | None,
    x_ND: Tensor,
    own_N1: Tensor,
    take_NC: Tensor,
    value_CD: Tensor,
) -> Tensor:
    """The weighted picks, with own x and take value added, in the type of x. picks: None is all. C may be 0."""
    out_ND = weighted_picks(y_PD, weights_NK, picks) + own_N1 * upcast(x_ND)
    return (out_ND + take_NC @ upcast(value_CD)).to(x_ND.dtype)
