"""How rows reach their experts. Here all experts are local; expert parallelism has a version that sends rows to ranks.

Shape suffixes: N tokens, K picks of a token, P picks that are made, M rows, E experts, D model width, F width of what
an expert makes.
"""

from typing import Protocol

import torch
from torch import Tensor, nn

from models.kernels.grouped_mm import GroupedMM
from models.kernels.opaque import varying
from models.kernels.permute import Permute
from models.kernels.queues import Queues


class Rowwise(Protocol):
    """Experts: `num_local` of them are held here, and run on rows sorted by expert, `counts_E` for each."""

    @property
    def num_local(self) -> int: ...

    def __call__(self, x_MD: Tensor, counts_E: Tensor) -> Tensor: ...


class Matrices:
    """Experts that are one matrix each, [E, inputs, outputs]."""

    def __init__(self, grouped_mm: GroupedMM, weight_EDF: Tensor) -> None:
        self.grouped_mm, self.weight_EDF = grouped_mm, weight_EDF

    @property
    def num_local(self) -> int:
        return self.weight_EDF.shape[0]

    def __call__(self, x_MD: Tensor, counts_E: Tensor) -> Tensor:
        return self.grouped_mm(x_MD, self.weight_EDF, counts_E)


class LocalDispatch(nn.Module):
    """Puts the rows in the order of their experts and runs these. Nothing is sorted, and nothing put back: a pick's
    output is where its place says."""

    def __init__(self) -> None:
        super().__init__()
        self.queues, self.permute = Queues(), Permute()

    def forward(
        self, x_ND: Tensor, index_NK: Tensor, keep_NK: Tensor | None, experts: Rowwise
    ) -> tuple[Tensor, Tensor]:
        """index_NK: experts that the tokens pick, among all. keep_NK: the picks that are made; None is all.

        Returns (what the experts make of them, [P, F], places: see `models.kernels.picks`). Places are [N, K]; or as
        many times K as there are parts of each pick's output, which add up.
        """
        order = (x_ND, index_NK, keep_NK, experts.num_local)
        x_PD, places_NK, counts_E = self.arrange(*order) if keep_NK is None else varying(self.arrange, *order)
        return experts(x_PD, counts_E), places_NK

    def arrange(
        self, x_ND: Tensor, index_NK: Tensor, keep_NK: Tensor | None, num_experts: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(rows [P, D] by expert, and by token of each, places [N, K], rows of each expert [E])."""
        queue_NK = index_NK if keep_NK is None else index_NK.where(keep_NK, -1)
        place_1M, counts_1E = self.queues(queue_NK.view(1, -1), num_experts)
        counts_E = counts_1E[0]
        starts_E = counts_E.cumsum(0) - counts_E
        place_NK = place_1M.view_as(queue_NK)
        places_NK = torch.where(queue_NK < 0, -1, starts_E[queue_NK] + place_NK)
        # How many picks are made is read on the host, since it sets the shape. Meta, which knows no numbers, has all.
        every = keep_NK is None or keep_NK.is_meta
        rows = queue_NK.numel() if every else int(counts_E.sum())
        return self.permute(x_ND, places_NK, rows), places_NK, counts_E
