"""Causal attention over packed documents: the way that is fast on the device at hand, and what may take its place.

Shape suffixes: B batch, T sequence, H query heads, J key/value heads, K key and V value width of a head.
"""

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from models.kernels.attention.blocked import attend_blocked
from models.kernels.attention.reference import as_bias, as_gated_bias, attend, visibility

__all__ = [
    "Attend",
    "AttendInParts",
    "Softmax",
    "as_bias",
    "as_gated_bias",
    "attend",
    "attend_causal",
    "visibility",
]


def attend_causal(
    q_BTHK: Tensor,
    k_BTJK: Tensor,
    v_BTJV: Tensor,
    positions_BT: Tensor,
    documents_BT: Tensor | None,
    window: int | None,
) -> Tensor:
    """Every token attends to those of its document that are not later, and within the window. Returns [B, T, H, V].

    By blocks on CPUs; elsewhere by torch's own kernels, which are faster there.
    """
    if q_BTHK.device.type == "cpu":
        return attend_blocked(q_BTHK, k_BTJK, v_BTJV, positions_BT, documents_BT, window)
    if documents_BT is None and window is None:
        return attend(q_BTHK, k_BTJK, v_BTJV, None)
    if documents_BT is None:
        documents_BT = torch.zeros_like(positions_BT)
    visible = visibility(positions_BT, documents_BT, positions_BT, documents_BT, window)
    return attend(q_BTHK, k_BTJK, v_BTJV, as_bias(visible, q_BTHK.dtype))


class Attend(Protocol):
    """What weighs values by scores q k / sqrt(K), two ways to the same numbers. Both return [B, T, H, V]."""

    def causal(
        self,
        q_BTHK: Tensor,
        k_BTJK: Tensor,
        v_BTJV: Tensor,
        positions_BT: Tensor,
        documents_BT: Tensor | None,
        window: int | None,
    ) -> Tensor:
        """As `attend_causal`: tokens lie in the order of their positions."""
        ...

    def masked(self, q_BTHK: Tensor, k_BSJK: Tensor, v_BSJV: Tensor, bias_BTS: Tensor) -> Tensor:
        """Over any keys. bias_BTS is added to the scores; -inf hides a key."""
        ...


@runtime_checkable
class AttendInParts(Attend, Protocol):
    """What can be put together from a softmax over tokens that others computed."""

    def beside(self, out_BTHV: Tensor, lse_BTH: Tensor) -> Tensor:
        """[B, T, H, V]. out, lse: of all tokens that a query sees, see `SequenceGroup.attend`."""
        ...


class Softmax:
    causal = staticmethod(attend_causal)
    masked = staticmethod(attend)

    def beside(self, out_BTHV: Tensor, lse_BTH: Tensor) -> Tensor:
        return out_BTHV
