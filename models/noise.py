"""Random draws as a function of what they are for: run, sequence, layer, role, token, channel. Never of rank or order.

Every mesh, a recomputed layer and a resumed run thus draw what one process drew. The trainer gives each sequence of a
run a key (`Side.keys`), `LM` makes it the layer's; without keys, in evaluation and decoding, nothing is drawn.
Shape suffixes: B batch, T sequence (the part that the caller's side narrows to), N channels.
"""

import math
import zlib

import torch
from torch import Tensor

from models.state import Side

WORD = 0xFFFFFFFF


def mixed(state: Tensor, word: Tensor | int) -> Tensor:
    """A 32-bit hash of a state and one more word, in int64: two rounds of xor-shift and multiply (Wellons, lowbias32).

    The second factor is written as a negative number, so that no product leaves the 63 bits that all devices agree on.
    """
    x = (state ^ word) + 0x9E3779B9 & WORD
    x = (x ^ x >> 16) * 0x7FEB352D & WORD
    x = (x ^ x >> 15) * (0x846CA68B - 2**32) & WORD
    return x ^ x >> 16


def of_layer(side: Side, index: int) -> Side:
    """The side that layer `index` draws from."""
    return side if side.keys is None else side.with_keys(mixed(side.keys, index))


def uniform_sequences(side: Side, role: str) -> Tensor:
    """One draw from (0, 1) per sequence, float32 [B]. role: tells the draws of one layer apart."""
    return fraction(role_keys(side, role))


def uniform(side: Side, role: str, width: int) -> Tensor:
    """Independent draws from (0, 1), float32 [B, T, N], for N = width channels of each token of the side."""
    keys_B = role_keys(side, role)
    channel_N = torch.arange(width, device=keys_B.device)
    return fraction(mixed(mixed(keys_B[:, None], side.index_T)[..., None], channel_N))


def normal(side: Side, role: str, width: int) -> Tensor:
    """Independent draws from a Gaussian of mean 0 and variance 1, float32 [B, T, N]."""
    return gaussian(uniform(side, role, width))


def normal_sequences(side: Side, role: str, width: int) -> Tensor:
    """The same, `width` of them for each sequence, float32 [B, N]."""
    channel_N = torch.arange(width, device=side.tokens.device)
    return gaussian(fraction(mixed(role_keys(side, role)[:, None], channel_N)))


def gaussian(uniform: Tensor) -> Tensor:
    return torch.erfinv(2 * uniform - 1) * math.sqrt(2)


def role_keys(side: Side, role: str) -> Tensor:
    assert side.keys is not None, "nothing is drawn in evaluation and decoding; ask `side.draws` first"
    return mixed(side.keys, zlib.crc32(role.encode()))


def fraction(bits: Tensor) -> Tensor:
    """32 random bits as the middle of one of 2^23 equal parts of (0, 1): float32 holds it, and neither end."""
    return ((bits >> 9).to(torch.float32) + 0.5) * 2.0**-23
