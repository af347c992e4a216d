"""Mixes of streams by Triton's kernels: streams and what a branch made are rows of the same weighted sums.

Shape suffixes: N tokens, R rows, Q rows made, P rows of what a branch made, J = R + P, D width.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.kernels import mixing
from models.kernels.opaque import shaped_by
from models.params import upcast


def made_shapes(w_NQJ: Tensor, groups: list[Tensor], ways: list[int]) -> list[Tensor]:
    tokens, _, width = groups[0].shape
    return [groups[0].new_empty(tokens, count, width) for count in ways]


@shaped_by(made_shapes)
def mix(w_NQJ: Tensor, groups: list[Tensor], ways: list[int]) -> list[Tensor]:
    """groups: [N, R, D] and, if there is one, [N, P, D]. ways: how many of the Q rows each tensor made has."""
    made = made_shapes(w_NQJ, groups, ways)
    mixing.mix(w_NQJ, rows_of(groups), rows_of(made))
    return made


def gradient_shapes(w_NQJ: Tensor, groups: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    dw_NQJ = w_NQJ.new_empty(w_NQJ.shape, dtype=mixing.weight_type(w_NQJ, groups[0]))
    return [dw_NQJ, *(torch.empty_like(x, memory_format=torch.contiguous_format) for x in groups)]


@shaped_by(gradient_shapes)
def mix_backward(w_NQJ: Tensor, groups: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    """The gradients of the weights and of each group."""
    _, *made = gradient_shapes(w_NQJ, groups, grads)
    return [mixing.mix_backward(w_NQJ, rows_of(groups), rows_of(grads), rows_of(made)), *made]


def rows_of(groups: list[Tensor]) -> list[Tensor]:
    """Each row of each group, [N, D]."""
    return [row_ND for group in groups for row_ND in group.contiguous().unbind(1)]


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, ways: list[int], known: list[Tensor] | None, w_NQJ: Tensor, *groups: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(w_NQJ, *groups)
        # Of new tensors, since autograd would take what is returned for the argument.
        return tuple(mix(w_NQJ, list(groups), ways) if known is None else [x.detach() for x in known])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        w_NQJ, *groups = ctx.saved_tensors
        dw_NQJ, *made = mix_backward(w_NQJ, groups, list(grads))
        return None, None, dw_NQJ.to(w_NQJ.dtype), *made


def mixed(
    w_NQJ: Tensor, groups: list[Tensor], ways: list[int] | None = None, known: list[Tensor] | None = None
) -> tuple[Tensor, ...]:
    """The rows made, as tensors of so many of them; one, if `ways` is not given. known: these, where they have been
    made already, to be differentiated."""
    return _Mix.apply(ways or [w_NQJ.shape[-2]], known, w_NQJ, *groups)  # type: ignore[return-value]


def operands(
    streams_RD: Tensor, m_RQ: Tensor, out_PD: Tensor | None, b_PQ: Tensor | None, moves: bool
) -> tuple[Tensor, list[Tensor]]:
    """The weights [N, Q, J], or [Q, J] of all tokens, at least float32, and the groups of rows that they weight."""
    w_RQ = upcast(m_RQ)
    if moves:
        w_RQ = w_RQ + torch.eye(w_RQ.shape[-2], dtype=w_RQ.dtype, device=w_RQ.device)
    groups = [streams_RD.flatten(0, -3)]
    if out_PD is not None and b_PQ is not None:
        w_RQ = torch.cat([w_RQ, b_PQ.to(w_RQ.dtype)], dim=-2)
        groups.append(out_PD.flatten(0, -3).to(streams_RD.dtype))
    return w_RQ.mT if w_RQ.dim() == 2 else w_RQ.mT.flatten(0, -3), groups


def stream_mix(
    streams_RD: Tensor, m_RQ: Tensor, out_PD: Tensor | None = None, b_PQ: Tensor | None = None, moves: bool = False
) -> Tensor:
    """See `models.kernels.stream_mix.reference`. The weights' sums are in float32."""
    (made_NQD,) = mixed(*operands(streams_RD, m_RQ, out_PD, b_PQ, moves))
    return made_NQD.unflatten(0, streams_RD.shape[:-2])
