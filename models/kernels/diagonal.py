"""Linear recurrences with a vector as their state: h_t = a_t h_{t-1} + x_t, element by element.

Shape suffixes: B batch, T sequence, N chunks, C chunk; `...` channels.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.params import upcast

CHUNK = 64


def scan(
    decay_BT: Tensor, x_BT: Tensor, documents_BT: Tensor | None = None, state_B: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """decay: in [0, 1], [B, T, ...] like x. It starts from `state` [B, ...], begins anew where the document id changes,
    and passes over padding (id -1).

    Returns (h [B, T, ...] in x's type, the state after the last token, at least float32).
    """
    a, x = upcast(decay_BT), upcast(x_BT)
    if documents_BT is not None:
        ones = (1,) * (x.dim() - 2)
        real = (documents_BT >= 0).view(*documents_BT.shape, *ones)
        starts_BT = F.pad(documents_BT[:, 1:] != documents_BT[:, :-1], (1, 0))
        a = a.where(~starts_BT.view(*documents_BT.shape, *ones), 0).where(real, 1)
        x = x.where(real, 0)
    if state_B is not None:
        x = torch.cat([x[:, :1] + a[:, :1] * state_B[:, None], x[:, 1:]], 1)
    h = _Scan.apply(a, x)
    return h.to(x_BT.dtype), h[:, -1]


def recur(a_BT: Tensor, x_BT: Tensor) -> Tensor:
    """Within all chunks at once, and then from chunk to chunk."""
    length = a_BT.shape[1]
    size = min(CHUNK, length)
    missing = (0, 0) * (a_BT.dim() - 2) + (0, -length % size)
    a, x = (F.pad(y, missing).unflatten(1, (-1, size)) for y in (a_BT, x_BT))
    h = torch.empty_like(x)
    h[:, :, 0] = x[:, :, 0]
    for c in range(1, size):
        torch.addcmul(x[:, :, c], a[:, :, c], h[:, :, c - 1], out=h[:, :, c])
    from_start = a.cumprod(2)
    for n in range(1, h.shape[1]):
        h[:, n].addcmul_(from_start[:, n], h[:, n - 1, -1:])
    return h.flatten(1, 2)[:, :length]


class _Scan(torch.autograd.Function):
    """The gradient of a recurrence is the recurrence backwards, and needs no state but those that it returned."""

    @staticmethod
    def forward(ctx: Any, a_BT: Tensor, x_BT: Tensor) -> Tensor:
        h_BT = recur(a_BT, x_BT)
        ctx.save_for_backward(a_BT, h_BT)
        return h_BT

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BT: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        a_BT, h_BT = ctx.saved_tensors
        later = torch.cat([a_BT[:, 1:], torch.zeros_like(a_BT[:, :1])], 1)
        dx_BT = recur(later.flip(1), grad_BT.flip(1)).flip(1)
        before = torch.cat([torch.zeros_like(h_BT[:, :1]), h_BT[:, :-1]], 1)
        return dx_BT * before, dx_BT
