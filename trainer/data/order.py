"""The order of training samples: a pseudo-random permutation that is computed element by element.

A Feistel network permutes the smallest even number of bits that holds all samples, and a result that is out of range is
permuted again until it is in range (cycle walking; Black & Rogaway, "Ciphers with Arbitrary Finite Domains", 2002).
It needs no memory, and gives the same order on every machine and library version.
"""

import numpy as np
from numpy.typing import NDArray

ROUNDS = 6


def mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea & Flood 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permute(index: NDArray[np.int64], size: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Where permutation (seed, epoch) of 0..size-1 sends each index."""
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    key = mix(np.array([seed, epoch], dtype=np.int64).astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15))
    keys = mix(key[0] + mix(key[1] + np.arange(1, ROUNDS + 1, dtype=np.uint64)))
    out = index.astype(np.uint64)
    todo = np.arange(out.size)
    while todo.size:
        left, right = out[todo] >> half, out[todo] & mask
        for round_key in keys:
            left, right = right, left ^ (mix(right + round_key) & mask)
        out[todo] = (left << half) | right
        todo = todo[out[todo] >= np.uint64(size)]
    return out.astype(np.int64)


def slots(samples: NDArray[np.int64], size: int, seed: int) -> NDArray[np.int64]:
    """Which of `size` sequences each sample of an endless run is: an epoch holds each once, in its own order."""
    out = np.empty_like(samples)
    epochs = samples // size
    for epoch in np.unique(epochs):
        here = epochs == epoch
        out[here] = permute(samples[here] % size, size, seed, int(epoch))
    return out


def draw_keys(samples: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
    """32 bits for each sample of a run, from which its random draws are made (`models.noise`)."""
    start = mix(np.array([seed], dtype=np.int64).astype(np.uint64) + np.uint64(1))
    return (mix(start + samples.astype(np.uint64)) >> np.uint64(32)).astype(np.int64)
