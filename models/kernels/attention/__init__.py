"""Causal attention over packed documents: the way that is fast on the device at hand or that a run chose, and what may
take its place.

Shape suffixes: B batch, T sequence, H query heads, J key/value heads, K key and V value width of a head.
"""

from collections.abc import Callable
from types import MappingProxyType
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from models.kernels.attention.blocked import attend_blocked
from models.kernels.attention.reference import as_bias, as_gated_bias, attend, visibility
from models.kernels.of_libraries import Library

__all__ = [
    "Attend",
    "AttendInParts",
    "Softmax",
    "as_bias",
    "as_gated_bias",
    "attend",
    "attend_causal",
    "attend_sdpa",
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
    call = attend_blocked if q_BTHK.device.type == "cpu" else attend_sdpa
    return call(q_BTHK, k_BTJK, v_BTJV, positions_BT, documents_BT, window)


def attend_sdpa(
    q_BTHK: Tensor,
    k_BTJK: Tensor,
    v_BTJV: Tensor,
    positions_BT: Tensor,
    documents_BT: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    """`attend_causal` by torch's scaled_dot_product_attention, with a bias of [B, T, T] elements where there are
    documents or a window."""
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


class Softmax(Library):
    """A softmax over tokens. What is chosen is its `causal`."""

    name = "attention"
    reference: ClassVar[Callable[..., Any]] = staticmethod(attend_sdpa)
    automatic: ClassVar[Callable[..., Any]] = staticmethod(attend_causal)
    implementations = MappingProxyType({"blocks": attend_blocked, "sdpa": attend_sdpa})
    masked = staticmethod(attend)

    def order(self, device: torch.device) -> tuple[str, ...]:
        return ("blocks",) if device.type == "cpu" else ("sdpa",)

    def causal(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.call(*args, **kwargs)

    def beside(self, out_BTHV: Tensor, lse_BTH: Tensor) -> Tensor:
        return out_BTHV
