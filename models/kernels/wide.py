"""The type in which Triton's kernels compute."""

import torch
import triton.language as tl


def wide(*dtypes: torch.dtype) -> tl.dtype:
    """Of sums over operands of these types: float32 at least."""
    return tl.float64 if torch.float64 in dtypes else tl.float32
