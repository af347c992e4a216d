"""Grouped matrix product: consecutive groups of rows, each times a matrix of its own.

Shape suffixes: M rows, K and N inner and outer width, E groups.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from models.kernels.contiguous import ContiguousGradient

ALIGNMENT = 16  # bytes: what F.grouped_mm asks of every row


def grouped_mm(a_MK: Tensor, b_EKN: Tensor, counts_E: Tensor) -> Tensor:
    """`out[m] = a[m] @ b[e]`, where e is the group of row m. Returns [M, N].

    counts_E: rows of each group (integers, sum M); the rows of group 0 come first. Groups may be empty, and M may be 0.
    One fused call, without waiting for the device, for types below float64 whose rows are multiples of 16 bytes;
    otherwise `grouped_mm_loop`.
    """
    aligned = all(width * a_MK.element_size() % ALIGNMENT == 0 for width in b_EKN.shape[1:])
    if a_MK.dtype == torch.float64 or not aligned:
        return grouped_mm_loop(a_MK, b_EKN, counts_E)
    ends_E = counts_E.cumsum(0).to(torch.int32)
    # Its backward refuses gradients with strides of 0, such as those of a sum.
    return ContiguousGradient.apply(F.grouped_mm(a_MK.contiguous(), b_EKN, offs=ends_E))


def grouped_mm_loop(a_MK: Tensor, b_EKN: Tensor, counts_E: Tensor) -> Tensor:
    """The reference: one matrix product per group. Reads the counts on the host, so it waits for the device. On meta,
    which knows no counts, all rows are of the first group."""
    counts = [len(a_MK), *[0] * (len(b_EKN) - 1)] if a_MK.is_meta else counts_E.tolist()
    groups = a_MK.split(counts)
    return torch.cat([rows @ b_KN for rows, b_KN in zip(groups, b_EKN.unbind(), strict=True)])
