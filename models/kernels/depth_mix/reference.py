"""Weighted sums over depth in plain torch.

Shape suffixes: `...` tokens, D model width, C ways, J sources.
"""

import torch
from torch import Tensor


def depth_mix(sources: list[Tensor], w_CJ: Tensor) -> list[Tensor]:
    """out_c = sum_j w[..., c, j] sources[j], in the sources' type. w: of every token, or [C, J] of all of them."""
    # One addition after another: for one product the sources would have to be stacked, and every layer would keep
    # that copy for its backward, where addcmul keeps the sources themselves.
    mixed = []
    for w_J in w_CJ.unbind(-2):
        first, *weights = w_J.unsqueeze(-2).unbind(-1) if w_J.dim() > 1 else w_J.unbind(-1)
        out_D = sources[0] * first
        for source, weight in zip(sources[1:], weights, strict=True):
            out_D = torch.addcmul(out_D, source, weight)
        mixed.append(out_D.to(sources[0].dtype))
    return mixed
