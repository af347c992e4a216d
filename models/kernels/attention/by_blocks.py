"""Relatives of softmax attention, in plain torch by blocks of queries: what lies in the future is never computed.

Autograd keeps the scores of all blocks, T * T / 2 per head, until the backward pass.
Shape suffixes: B batch, T queries, S keys, H query heads, J key/value heads, G = H/J queries of a key head, K key and V
value width of a head, Q queries of a block, N slots of a memory.
"""

import torch
from torch import Tensor

from models.kernels.attention.blocked import blocks
from models.params import upcast


class ByBlocks:
    """`read` says what scores make of values."""

    def read(self, score_BJGQS: Tensor, v_BJSV: Tensor, queries: slice) -> Tensor:
        """[B, J, G, Q, V]. score: -inf where a key is hidden, but for one key at least. queries: which ones."""
        raise NotImplementedError

    def causal(
        self,
        q_BTHK: Tensor,
        k_BTJK: Tensor,
        v_BTJV: Tensor,
        positions_BT: Tensor,
        documents_BT: Tensor | None,
        window: int | None,
    ) -> Tensor:
        q_BJGTK, k_BJTK, v_BJTV = by_head(q_BTHK, k_BTJK.shape[2]), k_BTJK.transpose(1, 2), v_BTJV.transpose(1, 2)
        outs = []
        for block in blocks(q_BTHK.shape[1], documents_BT, positions_BT, window, q_BTHK.dtype):
            queries, keys = slice(block.start, block.stop), slice(block.first, block.stop)
            score = scores(q_BJGTK[..., queries, :], k_BJTK[..., keys, :])
            score[..., block.masked - block.first :] += block.bias[:, None, None]
            outs.append(self.read(score, v_BJTV[..., keys, :], queries))
        return by_token(torch.cat(outs, dim=-2))

    def masked(self, q_BTHK: Tensor, k_BSJK: Tensor, v_BSJV: Tensor, bias_BTS: Tensor) -> Tensor:
        score = scores(by_head(q_BTHK, k_BSJK.shape[2]), k_BSJK.transpose(1, 2)) + bias_BTS[:, None, None]
        return by_token(self.read(score, v_BSJV.transpose(1, 2), slice(None)))


class ClippedSoftmax(ByBlocks):
    """`clip((zeta - gamma) softmax(score) + gamma, 0, 1) v` (Bondarenko et al., arXiv 2306.12929)."""

    def __init__(self, gamma: float, zeta: float) -> None:
        self.gamma, self.zeta = gamma, zeta

    def weights(self, score: Tensor) -> Tensor:
        """At least in float32: bfloat16 would round the small difference that decides about clipping."""
        p = score.softmax(-1, dtype=torch.promote_types(score.dtype, torch.float32))
        return ((self.zeta - self.gamma) * p + self.gamma).clamp(0, 1).to(score.dtype)

    def read(self, score_BJGQS: Tensor, v_BJSV: Tensor, queries: slice) -> Tensor:
        return product(self.weights(score_BJGQS), v_BJSV)


class SoftmaxWithMemory(ByBlocks):
    """A softmax over tokens and a memory, which every query sees whole (Sukhbaatar et al., arXiv 1907.01470).

    q_BTHK: without positions, for the memory has none. k_JNK, v_JNV: its keys and values.
    """

    def __init__(self, q_BTHK: Tensor, k_JNK: Tensor, v_JNV: Tensor) -> None:
        self.score_BJGTN = scores(by_head(q_BTHK, k_JNK.shape[0]), k_JNK)
        self.v_JNV = v_JNV

    def read(self, score_BJGQS: Tensor, v_BJSV: Tensor, queries: slice) -> Tensor:
        memory_BJGQN = self.score_BJGTN[..., queries, :]
        slots = memory_BJGQN.shape[-1]
        p_BJGQX = torch.cat([memory_BJGQN, score_BJGQS], dim=-1).softmax(-1)
        return product(p_BJGQX[..., :slots], self.v_JNV) + product(p_BJGQX[..., slots:], v_BJSV)

    def beside(self, out_BTHV: Tensor, lse_BTH: Tensor) -> Tensor:
        score, heads = upcast(self.score_BJGTN), self.v_JNV.shape[0]
        tokens_BJGT1 = by_head(lse_BTH[..., None], heads)
        all_BJGT1 = torch.logaddexp(tokens_BJGT1, score.logsumexp(-1, keepdim=True))
        memory = product((score - all_BJGT1).exp().to(self.v_JNV.dtype), self.v_JNV)
        return by_token((tokens_BJGT1 - all_BJGT1).exp().to(out_BTHV.dtype) * by_head(out_BTHV, heads) + memory)


def by_head(x_BTHK: Tensor, heads: int) -> Tensor:
    """[B, J, G, T, K]"""
    return x_BTHK.unflatten(2, (heads, -1)).permute(0, 2, 3, 1, 4)


def by_token(x_BJGTV: Tensor) -> Tensor:
    """[B, T, H, V]"""
    return x_BJGTV.permute(0, 3, 1, 2, 4).flatten(2, 3)


def product(p_BJGQS: Tensor, v_JSV: Tensor) -> Tensor:
    """One matrix product per key head, whatever the number of its queries: [B, J, G, Q, V]."""
    return (p_BJGQS.flatten(2, 3) @ v_JSV).unflatten(2, p_BJGQS.shape[2:4])


def scores(q_BJGQK: Tensor, k_JSK: Tensor) -> Tensor:
    """q k / sqrt(K), [B, J, G, Q, S]. The keys may have a batch dimension."""
    return product(q_BJGQK * q_BJGQK.shape[-1] ** -0.5, k_JSK.transpose(-1, -2))
