"""Blocks of rows whose float32 intermediates stay in a CPU's cache.

Between two products of a step, what an operation wrote has left the cache before the next one reads it. Chains of
element-wise operations therefore run over blocks (docs/experiments.md). GPUs have other kernels, and take all at once.
"""

from collections.abc import Iterator

from torch import Tensor

# Elements of a block: 1 MiB of float32.
ELEMENTS = 2**18


def row_blocks(x: Tensor) -> Iterator[slice]:
    """Slices of the first dimension that together are all of it."""
    rows = x.shape[0]
    size = max(1, ELEMENTS * rows // max(1, x.numel())) if x.device.type == "cpu" else max(1, rows)
    for start in range(0, rows, size):
        yield slice(start, start + size)
