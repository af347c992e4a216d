"""Linear recurrences with a vector as their state: h_t = a_t h_{t-1} + x_t, element by element.

Numbers are real, or complex as pairs of real ones. Shape suffixes: B batch, T sequence, N chunks, C chunk; `...`
channels.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.kernels.opaque import opaque
from models.params import upcast

CHUNK = 64


class Numbers(NamedTuple):
    """What a recurrence asks of its numbers. one: the neutral element of `times`."""

    one: tuple[float, ...]
    times: Callable[[Tensor, Tensor], Tensor]
    conjugate: Callable[[Tensor], Tensor]
    recur: Callable[[Tensor, Tensor], Tensor]


def scan(
    decay_BT: Tensor, x_BT: Tensor, documents_BT: Tensor | None = None, state_B: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """decay: in [0, 1], [B, T, ...] like x. It starts from `state` [B, ...], begins anew where the document id changes,
    and passes over padding (id -1).

    Returns (h [B, T, ...] in x's type, the state after the last token, at least float32).
    """
    return scan_numbers(REAL, decay_BT, x_BT, documents_BT, state_B)


def scan_pairs(
    decay_BT2: Tensor, x_BT2: Tensor, documents_BT: Tensor | None = None, state_B2: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`scan` of complex numbers: the last dimension of everything is (real part, imaginary part)."""
    return scan_numbers(PAIRS, decay_BT2, x_BT2, documents_BT, state_B2)


def scan_numbers(
    numbers: Numbers, decay_BT: Tensor, x_BT: Tensor, documents_BT: Tensor | None, state_B: Tensor | None
) -> tuple[Tensor, Tensor]:
    a, x = upcast(decay_BT), upcast(x_BT)
    if documents_BT is not None:
        ones = (1,) * (x.dim() - 2)
        real = (documents_BT >= 0).view(*documents_BT.shape, *ones)
        starts_BT = F.pad(documents_BT[:, 1:] != documents_BT[:, :-1], (1, 0))
        a = a.where(~starts_BT.view(*documents_BT.shape, *ones), 0).where(real, a.new_tensor(numbers.one))
        x = x.where(real, 0)
    if state_B is not None:
        x = torch.cat([x[:, :1] + numbers.times(a[:, :1], state_B[:, None]), x[:, 1:]], 1)
    h = _Scan.apply(a, x, numbers)
    return h.to(x_BT.dtype), h[:, -1]


def same(x: Tensor) -> Tensor:
    return x


def times_pairs(x: Tensor, y: Tensor) -> Tensor:
    (a, b), (c, d) = x.unbind(-1), y.unbind(-1)
    return torch.stack([a * c - b * d, a * d + b * c], -1)


def conjugate_pairs(x: Tensor) -> Tensor:
    return x * x.new_tensor((1, -1))


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


# Opaque to torch.compile, which has no code of its own for complex numbers.
@opaque
def _recur_pairs(a_BT2: Tensor, x_BT2: Tensor) -> Tensor:
    a, x = (torch.view_as_complex(y.contiguous()) for y in (a_BT2, x_BT2))
    return torch.view_as_real(recur(a, x)).clone(memory_format=torch.contiguous_format)


REAL = Numbers((1,), torch.mul, same, recur)
PAIRS = Numbers((1, 0), times_pairs, conjugate_pairs, _recur_pairs)


class _Scan(torch.autograd.Function):
    """The gradient of a recurrence is the recurrence backwards, and needs no state but those that it returned."""

    @staticmethod
    def forward(ctx: Any, a_BT: Tensor, x_BT: Tensor, numbers: Numbers) -> Tensor:
        h_BT = numbers.recur(a_BT, x_BT)
        ctx.save_for_backward(a_BT, h_BT)
        ctx.numbers = numbers
        return h_BT

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BT: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        a_BT, h_BT = ctx.saved_tensors
        numbers: Numbers = ctx.numbers
        later = torch.cat([a_BT[:, 1:], torch.zeros_like(a_BT[:, :1])], 1)
        dx_BT = numbers.recur(numbers.conjugate(later).flip(1), grad_BT.flip(1)).flip(1)
        before = torch.cat([torch.zeros_like(h_BT[:, :1]), h_BT[:, :-1]], 1)
        return numbers.times(dx_BT, numbers.conjugate(before)), dx_BT, None
