"""A linear recurrence in the form that is fast for its length, on the device at hand.

Shape suffixes: B batch, T sequence, H key heads, J value heads, K key and V value width.
"""

from torch import Tensor

from models.kernels.linear.chunked import chunked
from models.kernels.linear.fused import fits, fused
from models.kernels.linear.recurrent import recurrent


def matrix_recurrence(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTJV: Tensor,
    g: Tensor | None = None,
    beta_BTJ: Tensor | None = None,
    *,
    scale: float,
    value_g_BTJV: Tensor | None = None,
    documents_BT: Tensor | None = None,
    state_BJKV: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `recurrent`, which is the form for one token; longer ones go by chunks, in fla's kernels where they fit."""
    if value_g_BTJV is None and q_BTHK.shape[1] > 1:
        if fits(v_BTJV.device.type, v_BTJV.dtype, k_BTHK.shape[-1], beta_BTJ is not None):
            return fused(
                q_BTHK, k_BTHK, v_BTJV, g, beta_BTJ, scale=scale, documents_BT=documents_BT, state_BJKV=state_BJKV
            )
    return (recurrent if q_BTHK.shape[1] == 1 else chunked)(
        q_BTHK,
        k_BTHK,
        v_BTJV,
        g,
        beta_BTJ,
        scale=scale,
        value_g_BTJV=value_g_BTJV,
        documents_BT=documents_BT,
        state_BJKV=state_BJKV,
    )
