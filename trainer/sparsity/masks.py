"""Transposable 2:4 masks: of every 4 x 4 block, two elements of each row and of each column (arXiv 2404.01847).

With such a mask a matrix is 2:4 sparse along both its dimensions, for the forward and for the backward product.
Shape suffixes: M rows, N columns, R = M / 4, C = N / 4 blocks, P = 90 patterns.
"""

import itertools

import torch
from torch import Tensor

SIDE = 4


def patterns() -> Tensor:
    """Every 4 x 4 matrix of zeros and ones with two ones in each row and column: [90, 4, 4]."""
    rows = [[float(column in pair) for column in range(SIDE)] for pair in itertools.combinations(range(SIDE), 2)]
    choices = torch.tensor(list(itertools.product(rows, repeat=SIDE)))
    return choices[(choices.sum(1) == 2).all(-1)]


def transposable(scores_MN: Tensor) -> Tensor:
    """The mask (bool) that keeps the largest sum of scores in each block; of equals the first pattern.

    Raises ValueError unless both dimensions are multiples of 4.
    """
    if scores_MN.dim() != 2 or any(size % SIDE for size in scores_MN.shape):
        shape = " x ".join(map(str, scores_MN.shape))
        raise ValueError(f"a matrix of {shape} has no 4 x 4 blocks; use widths that are multiples of {SIDE}")
    blocks_RCij = scores_MN.unflatten(1, (-1, SIDE)).unflatten(0, (-1, SIDE)).transpose(1, 2)
    every_Pij = patterns().to(scores_MN)
    best_RC = torch.einsum("rcij,pij->rcp", blocks_RCij, every_Pij).argmax(-1)
    return every_Pij[best_RC].bool().transpose(1, 2).flatten(2).flatten(0, 1)
