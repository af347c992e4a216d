"""Memory that this process frees stays its own, for training on a CPU."""

import ctypes

# glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def keep_freed_memory() -> None:
    """Have glibc reuse what large tensors leave. By default it hands them back to the kernel, which has to clear every
    page again at the next step: 94,000 page faults, 4 % of a step (docs/experiments.md). Nothing, with another libc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)
