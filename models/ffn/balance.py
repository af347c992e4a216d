"""Load statistics and auxiliary losses of routers. Losses are sums over this rank's valid tokens.

Shape suffixes: B batch, T sequence (this rank's share), K picks, E experts, G groups (B, or 1).
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from models.params import upcast

StatsGroup = Literal["sequence", "microbatch"]


class LocalReduce:
    """Sums statistics over the ranks that share their group. This one: there are no others."""

    def __call__(self, counts: Tensor) -> Tensor:
        return counts


class Grouped(nn.Module):
    """A module that sums statistics over a group of tokens; `reduce` is replaced where ranks share a group."""

    stats_group: StatsGroup
    reduce: Callable[[Tensor], Tensor]


def count_picks(index_BTK: Tensor, valid_BT: Tensor, num_experts: int) -> Tensor:
    """How often each row's valid tokens pick each expert: [B, E], int64 (exact, so the order of additions is free)."""
    ones = valid_BT[..., None].expand_as(index_BTK).flatten(1).long()
    zeros = ones.new_zeros(index_BTK.shape[0], num_experts)
    return zeros.scatter_add(1, index_BTK.flatten(1), ones)


def group_loads(
    picks_BE: Tensor, valid_BT: Tensor, group: StatsGroup, reduce: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> Tensor:
    """f: picks of each expert / valid tokens, over each group, [G, E]. No gradient; its sum over E is K.

    group: "sequence" is one row of the batch, "microbatch" all of them; either may be spread over ranks.
    """
    counts = torch.cat([picks_BE, valid_BT.sum(1, keepdim=True)], dim=1)
    counts = reduce(counts if group == "sequence" else counts.sum(0, keepdim=True)).to(dtype)
    return counts[:, :-1] / counts[:, -1:].clamp_min(1)


def balance_terms(probs_BTE: Tensor, loads_GE: Tensor, valid_BT: Tensor) -> Tensor:
    """`sum over valid tokens t of f_e(group of t) p_te`, [E]: what this rank adds to tokens * f_e * mean(p_e).

    Linear in p for given f, so that the ranks' shares and their gradients simply add up.
    """
    sums_BE = probs_BTE.masked_fill(~valid_BT[..., None], 0).sum(1)
    return (sums_BE * loads_GE).sum(0)


def z_loss(logits_BTE: Tensor, valid_BT: Tensor) -> Tensor:
    """`sum over valid tokens of logsumexp(logits)^2` (ST-MoE, arXiv 2202.08906). Returns shape []."""
    return upcast(logits_BTE).logsumexp(-1).square().masked_fill(~valid_BT, 0).sum()
