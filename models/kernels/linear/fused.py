"""flash-linear-attention's Triton kernels for linear recurrences, in the terms of ours (github.com/fla-org, MIT).

They are called where the package is installed, on CUDA, in bfloat16. Shape suffixes: B batch, T sequence, H key heads,
J value heads, K key and V value width, N documents of all rows.
"""

import functools
import importlib
import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from models.kernels.linear.operands import prepare

WIDEST_KEY = 256  # of their delta rules


def without_fla(device: torch.device, dtype: torch.dtype, delta_key: int | None) -> str | None:
    """Why they cannot be called there for values of this type. They do not take float64, and their delta rule not
    float32. delta_key: width of a key, for the delta rule."""
    # First, because a compiler should not look for packages.
    if device.type != "cuda":
        return f"its kernels need a GPU, where this is {device.type}"
    if delta_key is not None and delta_key > WIDEST_KEY:
        return f"its delta rule takes keys of up to {WIDEST_KEY} channels, where these have {delta_key}"
    if not installed():
        return "flash-linear-attention is not installed"
    if dtype != torch.bfloat16:
        return f"its kernels are called in bfloat16, where this is {str(dtype).removeprefix('torch.')}"
    return None


@functools.cache
def installed() -> bool:
    return importlib.util.find_spec("fla") is not None


def kernel(per_channel: bool, decays: bool, delta: bool) -> Callable[..., tuple[Tensor, Tensor]]:
    """Of this kind of recurrence. Not imported before: fla looks for a driver when it is."""
    if delta:
        name = "kda" if per_channel else "gated_delta_rule" if decays else "delta_rule"
    else:
        name = "gla" if per_channel else "simple_gla"
    return getattr(importlib.import_module(f"fla.ops.{name}"), f"chunk_{name}")


def fused(
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
    """`recurrent`, but for decays of value channels.

    Several documents are one row with the places where they start, and a state for each.
    """
    operands = prepare(q_BTHK, k_BTHK, v_BTJV, g, beta_BTJ, scale, None, documents_BT, state_BJKV)
    groups, dtype = v_BTJV.shape[2] // k_BTHK.shape[2], v_BTJV.dtype
    x = {name: y.to(dtype).repeat_interleave(groups, 2) for name, y in (("q", operands.q_BTHK), ("k", operands.k_BTHK))}
    x["v"] = operands.v_BTJV.to(dtype)
    per_channel = g is not None and g.dim() == 4
    if g is not None:
        x["g"] = operands.g if per_channel else operands.g[..., 0]
    if operands.beta_BTJ1 is not None:
        x["beta"] = operands.beta_BTJ1[..., 0]
    call = kernel(per_channel, g is not None, beta_BTJ is not None)
    state = operands.state_BJKV
    if documents_BT is None:
        return call(**x, scale=1.0, initial_state=state, output_final_state=True)
    rows, length = documents_BT.shape
    segments_BT = operands.segments_BT
    starts_BT = F.pad(segments_BT[:, 1:] != segments_BT[:, :-1], (1, 0), value=True)
    first_N = starts_BT.flatten().nonzero()[:, 0]
    ends = F.pad(first_N, (0, 1), value=rows * length)
    counts_B = starts_BT.sum(1)
    last_B = counts_B.cumsum(0) - 1
    states = state.new_zeros(first_N.shape[0], *state.shape[1:]).index_copy(0, last_B - counts_B + 1, state)
    x = {name: y.flatten(0, 1)[None] for name, y in x.items()}
    out, after = call(**x, scale=1.0, initial_state=states, output_final_state=True, cu_seqlens=ends)
    return out[0].unflatten(0, (rows, length)), after[last_B]
