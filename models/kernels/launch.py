"""What launches of Triton kernels have in common."""

import torch
import triton
import triton.language as tl
from torch import Tensor

ALIGNMENT = 16  # bytes
WIDEST = 4096  # elements that a program holds of one operand


def wide(*dtypes: torch.dtype) -> tl.dtype:
    """The type of sums over operands of these types: float32 at least."""
    return tl.float64 if torch.float64 in dtypes else tl.float32


def block(width: int, most: int = WIDEST) -> int:
    """Elements of a row that one program takes: a power of 2."""
    return min(triton.next_power_of_2(width), most)


def aligned(x: Tensor) -> Tensor:
    """x, or a copy of it, in order and where a load of 16 bytes may begin."""
    x = x.contiguous()
    return x if x.data_ptr() % ALIGNMENT == 0 else x.clone()


def addresses(tensors: list[Tensor]) -> Tensor:
    """Where tensors are, int64 on their device: for kernels that loop over any number of them."""
    table = torch.tensor([x.data_ptr() for x in tensors], dtype=torch.int64)
    device = tensors[0].device
    return table if device.type == "cpu" else table.pin_memory().to(device, non_blocking=True)
