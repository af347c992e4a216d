"""Block-diagonal maps, and what structured matrices share of them.

Shape suffixes: N tokens, K blocks, P inputs and Q outputs of a block.
"""

import torch
from torch import Tensor


def by_block(x_NKP: Tensor, weight_KPQ: Tensor) -> Tensor:
    """Each block's inputs times its own matrix: [..., K, Q]."""
    flat_KMP = x_NKP.flatten(0, -3).transpose(0, 1)
    return torch.bmm(flat_KMP, weight_KPQ).transpose(0, 1).unflatten(0, x_NKP.shape[:-2])


def refuse_uneven(blocks: int, what: str, width: int) -> None:
    """Raise ValueError unless the blocks share out a width."""
    if width % blocks:
        raise ValueError(f"blocks is {blocks}, which does not divide {what}, {width}; change one of them")
