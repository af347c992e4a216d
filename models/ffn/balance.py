"""Load statistics and auxiliary losses of routers. Losses are sums over this rank's valid tokens.

Shape suffixes: B batch, T sequence (this rank's share), K picks, E experts, G groups (B, or 1).
"""

import torch
from torch import Tensor

from models.ffn.groups import Grouped
from models.params import upcast


class Balance(Grouped):
    """Losses that even out the use of experts over each group of tokens."""

    def load(self, index_BTK: Tensor, keep_BTK: Tensor | None, valid_BT: Tensor, num_experts: int) -> Tensor:
        """This rank's picks of each expert, [E]."""
        if keep_BTK is not None:
            valid_BT = keep_BTK & valid_BT[..., None]
        return count_picks(index_BTK, valid_BT, num_experts).sum(0)

    def shares(self, index_BTK: Tensor, valid_BT: Tensor, num_experts: int) -> Tensor:
        """f: picks of each expert / valid tokens, over each group, [G, E] float64. No gradient; it sums to K."""
        picks_BE = count_picks(index_BTK, valid_BT, num_experts)
        counts = self.peers.sum(self.by_group(torch.cat([picks_BE, valid_BT.sum(1, keepdim=True)], dim=1)))
        return counts[:, :-1].double() / counts[:, -1:].clamp_min(1)

    def terms(self, probs_BTE: Tensor, index_BTK: Tensor, valid_BT: Tensor) -> Tensor:
        """`sum over valid tokens t of f_e(group of t) p_te`, [E]: what this rank adds to tokens * f_e * mean(p_e).

        Linear in p for given f, so that the ranks' shares and their gradients simply add up.
        """
        shares_GE = self.shares(index_BTK, valid_BT, probs_BTE.shape[-1]).to(probs_BTE.dtype)
        return (sum_valid(probs_BTE, valid_BT) * shares_GE).sum(0)

    def variation(self, amounts_BTE: Tensor, valid_BT: Tensor) -> Tensor:
        """This rank's share of `sum over groups of tokens * CV(sum of amounts)^2`, shape []. CV: the standard deviation
        over experts (of all, not of a sample) divided by the mean.

        It is not linear in the sums, which other ranks add to: its gradient is right for this rank's tokens given
        theirs, and its value is divided among the ranks by their tokens.
        """
        own_GE = self.by_group(sum_valid(amounts_BTE, valid_BT))
        tokens_G1 = self.by_group(valid_BT.sum(1, keepdim=True)).to(own_GE.dtype)
        whole = self.peers.sum(torch.cat([own_GE.detach(), tokens_G1], dim=1))
        total_GE = own_GE + (whole[:, :-1] - own_GE.detach())
        mean_G1 = total_GE.mean(-1, keepdim=True)
        safe_G1 = torch.where(mean_G1 > 0, mean_G1, 1)
        loss_G1 = whole[:, -1:] * ((total_GE - mean_G1) / safe_G1).square().mean(-1, keepdim=True)
        part_G1 = tokens_G1 / whole[:, -1:].clamp_min(1)
        return (loss_G1 - loss_G1.detach() * (1 - part_G1)).sum()


def sum_valid(x_BTE: Tensor, valid_BT: Tensor) -> Tensor:
    return x_BTE.masked_fill(~valid_BT[..., None], 0).sum(1)


def count_picks(index_BTK: Tensor, valid: Tensor, num_experts: int) -> Tensor:
    """How often each row picks each expert: [B, E], int64 (exact, so the order of additions is free). valid: [B, T] by
    token or [B, T, K] by pick."""
    ones = (valid if valid.dim() == 3 else valid[..., None]).expand_as(index_BTK).flatten(1).long()
    zeros = ones.new_zeros(index_BTK.shape[0], num_experts)
    return zeros.scatter_add(1, index_BTK.flatten(1), ones)


def z_loss(logits_BTE: Tensor, valid_BT: Tensor) -> Tensor:
    """`sum over valid tokens of logsumexp(logits)^2` (ST-MoE, arXiv 2202.08906). Returns shape []."""
    return upcast(logits_BTE).logsumexp(-1).square().masked_fill(~valid_BT, 0).sum()
