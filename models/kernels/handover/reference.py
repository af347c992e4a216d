"""A write of streams and the read behind it in plain torch.

Shape suffixes: `...` tokens, R rows (streams, or their fractions), Q rows read, P rows of what a branch made, D width.
"""

from collections.abc import Callable

from torch import Tensor

from models.kernels.handover.reading import Reading, Settle
from models.state import State


def handover(
    streams_RD: Tensor,
    m_RR: Tensor,
    out_PD: Tensor,
    b_PR: Tensor,
    moves: bool,
    reading: Reading | None,
    settle: Settle,
    mix: Callable[..., Tensor],
) -> tuple[Tensor, Tensor, State]:
    """The streams with what a branch made [..., R, D], what the next one reads of them [..., Q, D], and what `settle`
    keeps. mix: `stream_mix`. reading: None where no weight depends on the streams."""
    written_RD = mix(streams_RD, m_RR, out_PD, b_PR, moves)
    weights_RQ, kept = settle(None if reading is None else reading.logits(written_RD))
    return written_RD, mix(written_RD, weights_RQ), kept
