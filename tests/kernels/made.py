"""Picks of which some are made, and where their rows stand."""

import torch
from torch import Tensor


def placed(tokens: int, picks: int, share: float) -> tuple[Tensor, int]:
    """(places [N, K] in no order at all, their number): about this share of the picks is made."""
    generator = torch.Generator().manual_seed(0)
    keep_M = torch.rand(tokens * picks, generator=generator) < share
    rows = int(keep_M.sum())
    places_M = torch.full((tokens * picks,), -1)
    places_M[keep_M] = torch.randperm(rows, generator=generator)
    return places_M.view(tokens, picks), rows
