"""Decays between the tokens of a chunk, per head or per key channel.

Log decays between two tokens are sums of g between them, one column per earlier token. Differences of one running sum
would cancel behind strong gates (an error of 1e-4 in float32 at -50), and are positive above the diagonal: exp reaches
inf, whose gradient is nan.

Shape suffixes: C chunk, K key width; `...` stands for batch, chunks, key heads and value heads of a key head.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.kernels.blocks import row_blocks


class Decay:
    """into: from the chunk's start to a token. out_of: from a token to the chunk's end. through: the whole chunk. They
    broadcast over [..., C, K], [..., C, K] and [..., K, V]."""

    into: Tensor
    out_of: Tensor
    through: Tensor

    def pairs(self, x: Tensor, y: Tensor) -> Tensor:
        """[..., C, C]: sum over K of x_i y_j and the decay from j to i, zero unless i is j or later in its document."""
        raise NotImplementedError


class HeadDecay(Decay):
    """g [..., C, 1]: one product of matrices serves all channels."""

    chunk = 64

    def __init__(self, g: Tensor, seen: Tensor, enters: Tensor, passes: Tensor) -> None:
        log = between(g)[..., 0]
        self._decay = log.exp().where(seen, 0)
        from_start = g.cumsum(-2).exp()
        self.into = from_start * enters[..., None]
        self.out_of = self._decay[..., -1, :, None]
        self.through = from_start[..., -1:, :] * passes[..., None]

    def pairs(self, x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.mT) * self._decay


class ChannelDecay(Decay):
    """g [..., C, K]: C x C x K decays, so that chunks are short."""

    chunk = 16

    def __init__(self, g: Tensor, seen: Tensor, enters: Tensor, passes: Tensor) -> None:
        self._g, self._seen = g, seen
        from_start = g.cumsum(-2).exp()
        self.into = from_start * enters[..., None]
        after = torch.cat([g[..., 1:, :], torch.zeros_like(g[..., :1, :])], -2)
        self.out_of = after.flip(-2).cumsum(-2).flip(-2).exp() * seen[..., -1, :, None]
        self.through = from_start[..., -1, :, None] * passes[..., None]

    def pairs(self, x: Tensor, y: Tensor) -> Tensor:
        shape = self._g.shape
        seen = self._seen.expand(*shape[:-2], shape[-2], shape[-2])
        flat = (tensor.reshape(-1, *tensor.shape[-2:]) for tensor in (x.expand(shape), y.expand(shape), self._g, seen))
        return _Pairs.apply(*flat).view(seen.shape)


def between(g: Tensor) -> Tensor:
    """[..., C, C, K or 1]: at (i, j) the sum of g over j < l <= i."""
    index = torch.arange(g.shape[-2], device=g.device)
    later = (index[:, None] > index)[..., None]
    return g[..., :, None, :].where(later, 0).cumsum(-3)


class _Pairs(torch.autograd.Function):
    """The decays are as large as chunk times the keys: they are made again for the backward pass, a few chunks at a
    time."""

    @staticmethod
    def forward(ctx: Any, x_NCK: Tensor, y_NCK: Tensor, g_NCK: Tensor, seen_NCC: Tensor) -> Tensor:
        ctx.save_for_backward(x_NCK, y_NCK, g_NCK, seen_NCC)
        out_NCC = x_NCK.new_empty(seen_NCC.shape)
        for block in blocks_of(g_NCK):
            decay = between(g_NCK[block]).exp().where(seen_NCC[block][..., None], 0)
            out_NCC[block] = torch.einsum("nik,njk,nijk->nij", x_NCK[block], y_NCK[block], decay)
        return out_NCC

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NCC: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x_NCK, y_NCK, g_NCK, seen_NCC = ctx.saved_tensors
        dx_NCK, dy_NCK, dg_NCK = torch.empty_like(x_NCK), torch.empty_like(y_NCK), torch.empty_like(g_NCK)
        index = torch.arange(g_NCK.shape[1], device=g_NCK.device)
        later = (index[:, None] > index)[..., None]
        for block in blocks_of(g_NCK):
            x, y = x_NCK[block][:, :, None], y_NCK[block][:, None]
            part = between(g_NCK[block]).exp().where(seen_NCC[block][..., None], 0) * grad_NCC[block][..., None]
            toward = part * x
            dy_NCK[block] = toward.sum(1)
            dx_NCK[block] = (part * y).sum(2)
            # g_l is in the decay of every pair with j < l <= i.
            dg_NCK[block] = (toward * y).flip(1).cumsum(1).flip(1).where(later, 0).sum(2)
        return dx_NCK, dy_NCK, dg_NCK, None


def blocks_of(g_NCK: Tensor) -> Any:
    """Slices of N that keep C x C x K numbers each in the cache."""
    rows, length, width = g_NCK.shape
    return row_blocks(g_NCK[..., :1].expand(rows, length, length * width))
