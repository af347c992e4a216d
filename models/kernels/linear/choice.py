"""A linear recurrence over more than one token, in the form that is fast on the device at hand or that a run chose.

One token is decoded by `recurrent`, which is the definition, whatever was chosen.
Shape suffixes: B batch, T sequence, H key heads, J value heads, K key and V value width.
"""

from collections.abc import Callable
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor

from models.kernels.linear.chunked import chunked
from models.kernels.linear.fused import fused, without_fla
from models.kernels.linear.recurrent import recurrent
from models.kernels.of_libraries import Library


def matrix_recurrence(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTJV: Tensor,
    g: Tensor | None = None,
    beta_BTJ: Tensor | None = None,
    *,
    scale: float,
    documents_BT: Tensor | None = None,
    state_BJKV: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`recurrent`, but for decays of value channels: in fla's kernels where they can be called, and by chunks."""
    delta_key = None if beta_BTJ is None else k_BTHK.shape[-1]
    form = chunked if without_fla(v_BTJV.device, v_BTJV.dtype, delta_key) else fused
    return form(q_BTHK, k_BTHK, v_BTJV, g, beta_BTJ, scale=scale, documents_BT=documents_BT, state_BJKV=state_BJKV)


class Recurrence(Library):
    """`recurrent`, but for decays of value channels.

    delta_key: width of a key, for the delta rule; None for plain writes. wide: what it is given is at least float32
    whatever the model computes in.
    """

    name = "recurrence"
    reference: ClassVar[Callable[..., Any]] = staticmethod(chunked)
    automatic: ClassVar[Callable[..., Any]] = staticmethod(matrix_recurrence)
    implementations = MappingProxyType({"fla": fused, "chunked": chunked, "recurrent": recurrent})

    def __init__(self, *, delta_key: int | None = None, wide: bool = False) -> None:
        super().__init__()
        self.delta_key, self.wide = delta_key, wide

    def order(self, device: torch.device) -> tuple[str, ...]:
        return ("fla", "chunked") if device.type == "cuda" else ("chunked",)

    def refusal(self, implementation: str, device: torch.device, dtype: torch.dtype) -> str | None:
        if implementation != "fla":
            return None
        return without_fla(device, torch.promote_types(dtype, torch.float32) if self.wide else dtype, self.delta_key)


class SlotRecurrence(Library):
    """`recurrent` with decays of value channels, which fla has no kernel for."""

    name = "slot_recurrence"
    reference: ClassVar[Callable[..., Any]] = staticmethod(chunked)
    automatic: ClassVar[Callable[..., Any]] = staticmethod(chunked)
    implementations = MappingProxyType({"chunked": chunked, "recurrent": recurrent})

    def order(self, device: torch.device) -> tuple[str, ...]:
        return ("chunked",)
