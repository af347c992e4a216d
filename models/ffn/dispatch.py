"""How rows reach their experts. Here all experts are local; expert parallelism has a version that sends rows to ranks.

Shape suffixes: M rows, E experts, D model width, F width of what an expert makes.
"""

from typing import Protocol

import torch
from torch import Tensor

from models.kernels.grouped_mm import grouped_mm


class Rowwise(Protocol):
    """Experts: `num_local` of them are held here, and run on rows sorted by expert, `counts_E` for each."""

    @property
    def num_local(self) -> int: ...

    def __call__(self, x_MD: Tensor, counts_E: Tensor) -> Tensor: ...


class Matrices:
    """Experts that are one matrix each, [E, inputs, outputs]."""

    def __init__(self, weight_EDF: Tensor) -> None:
        self.weight_EDF = weight_EDF

    @property
    def num_local(self) -> int:
        return self.weight_EDF.shape[0]

    def __call__(self, x_MD: Tensor, counts_E: Tensor) -> Tensor:
        return grouped_mm(x_MD, self.weight_EDF, counts_E)


class LocalDispatch:
    """Sort the rows by expert, run the experts, restore the order.

    Every step is a permutation: backward has no sums whose order could depend on threads.
    """

    def __call__(self, x_MD: Tensor, expert_M: Tensor, experts: Rowwise) -> Tensor:
        """x_MD: rows in any order. expert_M: each row's expert, among all experts. Returns y_MD in the rows' order."""
        order_M = expert_M.argsort(stable=True)
        counts_E = count_sorted(expert_M.index_select(0, order_M), experts.num_local)
        y_MD = experts(x_MD.index_select(0, order_M), counts_E)
        return y_MD.index_select(0, inverse(order_M))


def count_sorted(expert_M: Tensor, num_experts: int) -> Tensor:
    """Rows of each expert, from sorted expert indices. Unlike bincount it does not wait for the device."""
    ids_E = torch.arange(num_experts, device=expert_M.device)
    ends_E = torch.searchsorted(expert_M, ids_E, right=True)
    return ends_E.diff(prepend=ends_E.new_zeros(1))


def inverse(order_M: Tensor) -> Tensor:
    """The permutation that undoes `order_M`."""
    return torch.empty_like(order_M).scatter(0, order_M, torch.arange(order_M.shape[0], device=order_M.device))
