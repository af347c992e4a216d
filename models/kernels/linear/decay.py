"""Decays between the tokens of a chunk: per head, per key channel or per value channel.

Log decays between two tokens are sums of g between them, one column per earlier token. Differences of one running sum
would cancel behind strong gates (an error of 1e-4 in float32 at -50), and are positive above the diagonal: exp reaches
inf, whose gradient is nan.

Shape suffixes: C chunk, K key width, V value width; `...` stands for batch, chunks, key heads and value heads of a key
head.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.kernels.blocks import row_blocks


class Decay:
    """into: from the chunk's start to a token. out_of: from a token to the chunk's end. through: the whole chunk, which
    broadcasts over the state [..., K, V]. The other two broadcast over keys [..., C, K]."""

    into: Tensor
    out_of: Tensor
    through: Tensor

    def read(self, q: Tensor, state: Tensor) -> Tensor:
        """[..., C, V]: what queries find of the state before the chunk."""
        return (self.into * q) @ state

    def mix(self, q: Tensor, k: Tensor, u: Tensor) -> Tensor:
        """[..., C, V]: what queries find of the chunk's own writes u [..., C, V]."""
        return self.pairs(q, k) @ u

    def leaving(self, k: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and writes whose products the chunk adds to the state."""
        return self.out_of * k, u

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
        return _Pairs.apply(*matrices(x.expand(shape), y.expand(shape), self._g, seen)).view(seen.shape)


class ValueDecay(ChannelDecay):
    """g [..., C, V]: the same on the other side of the state, for plain writes. `into` and `out_of` broadcast over
    values."""

    def __init__(self, g: Tensor, seen: Tensor, enters: Tensor, passes: Tensor) -> None:
        super().__init__(g, seen, enters, passes)
        self.through = self.through.mT

    def read(self, q: Tensor, state: Tensor) -> Tensor:
        return self.into * (q @ state)

    def mix(self, q: Tensor, k: Tensor, u: Tensor) -> Tensor:
        seen = self._seen.expand(*u.shape[:-2], u.shape[-2], u.shape[-2])
        return _Mix.apply(*matrices((q @ k.mT).expand(seen.shape), u, self._g, seen)).view(u.shape)

    def leaving(self, k: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        return k, self.out_of * u


def matrices(*tensors: Tensor) -> Iterator[Tensor]:
    """With all but the last two dimensions as one."""
    return (x.reshape(-1, *x.shape[-2:]) for x in tensors)


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
        for block, decay in decays(g_NCK, seen_NCC):
            out_NCC[block] = torch.einsum("nik,njk,nijk->nij", x_NCK[block], y_NCK[block], decay)
        return out_NCC

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NCC: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x_NCK, y_NCK, g_NCK, seen_NCC = ctx.saved_tensors
        dx_NCK, dy_NCK, dg_NCK = torch.empty_like(x_NCK), torch.empty_like(y_NCK), torch.empty_like(g_NCK)
        for block, decay in decays(g_NCK, seen_NCC):
            x, y = x_NCK[block][:, :, None], y_NCK[block][:, None]
            part = decay * grad_NCC[block][..., None]
            toward = part * x
            dy_NCK[block] = toward.sum(1)
            dx_NCK[block] = (part * y).sum(2)
            dg_NCK[block] = toward_gates(toward * y)
        return dx_NCK, dy_NCK, dg_NCK, None


class _Mix(torch.autograd.Function):
    """out_im = sum over j of a_ij y_jm and the decay of channel m from j to i. Its gradient for a is `_Pairs` of its
    output's gradient and y."""

    @staticmethod
    def forward(ctx: Any, a_NCC: Tensor, y_NCV: Tensor, g_NCV: Tensor, seen_NCC: Tensor) -> Tensor:
        ctx.save_for_backward(a_NCC, y_NCV, g_NCV, seen_NCC)
        out_NCV = torch.empty_like(y_NCV)
        for block, decay in decays(g_NCV, seen_NCC):
            out_NCV[block] = torch.einsum("nij,njv,nijv->niv", a_NCC[block], y_NCV[block], decay)
        return out_NCV

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NCV: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        a_NCC, y_NCV, g_NCV, seen_NCC = ctx.saved_tensors
        da_NCC, dy_NCV, dg_NCV = torch.empty_like(a_NCC), torch.empty_like(y_NCV), torch.empty_like(g_NCV)
        for block, decay in decays(g_NCV, seen_NCC):
            part = decay * grad_NCV[block][:, :, None]
            product = part * y_NCV[block][:, None]
            da_NCC[block] = product.sum(3)
            dy_NCV[block] = torch.einsum("nij,nijv->njv", a_NCC[block], part)
            dg_NCV[block] = toward_gates(product * a_NCC[block][..., None])
        return da_NCC, dy_NCV, dg_NCV, None


def decays(g_NCK: Tensor, seen_NCC: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """A block of N, and its decays from token j to token i [..., C, C, K]: C x C x K numbers each stay in the cache."""
    rows, length, width = g_NCK.shape
    for block in row_blocks(g_NCK[..., :1].expand(rows, length, length * width)):
        yield block, between(g_NCK[block]).exp().where(seen_NCC[block][..., None], 0)


def toward_gates(part_NCCK: Tensor) -> Tensor:
    """[N, C, K]: g_l is in the decay of every pair with j < l <= i."""
    index = torch.arange(part_NCCK.shape[1], device=part_NCCK.device)
    later = (index[:, None] > index)[..., None]
    return part_NCCK.flip(1).cumsum(1).flip(1).where(later, 0).sum(2)
