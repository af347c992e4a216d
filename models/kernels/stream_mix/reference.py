"""Mixes of streams in plain torch.

Shape suffixes: `...` tokens, R rows (streams, or their fractions), Q rows made, P rows of what a branch made, D width.
"""

import torch
from torch import Tensor


def stream_mix(
    streams_RD: Tensor, m_RQ: Tensor, out_PD: Tensor | None = None, b_PQ: Tensor | None = None, moves: bool = False
) -> Tensor:
    """m^T streams + b^T out, [..., Q, D] in the streams' type. m, b: of every token, or of all of them.

    moves: m is what is moved between streams, which keep the rest: m + I stands in its place. So bfloat16 keeps rows
    that sum to 1.
    """
    if m_RQ.shape[-1] == 1 or torch.compiler.is_compiling():
        # What a compiler makes one loop of; and one row is a narrow product, which is slower than this (measured).
        mixed_QD = (m_RQ[..., None] * streams_RD[..., None, :]).sum(-3)
    else:
        mixed_QD = torch.einsum("...rq,...rd->...qd", m_RQ, streams_RD)
    if moves:
        mixed_QD = streams_RD + mixed_QD
    if out_PD is None or b_PQ is None:
        return mixed_QD
    if out_PD.shape[-2] == 1:
        return torch.addcmul(mixed_QD, b_PQ.mT, out_PD)
    return mixed_QD + torch.einsum("...pq,...pd->...qd", b_PQ, out_PD)
