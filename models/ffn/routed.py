"""What all FFNs with routed experts share: which rows go where, and how their outputs come back together.

Shape suffixes: N tokens, D width, K picks of a token.
"""

from torch import Tensor

from models.ffn.dispatch import LocalDispatch, Rowwise
from models.ffn.experts import ExpertParts, Experts
from models.kernels.combine import Combine
from models.kernels.combine.reference import Free
from models.pieces import WHOLE, Part
from models.slots import FFN


class RoutedFFN(FFN):
    """Runs on the rank's own tokens. `dispatch` is replaced where experts are spread out."""

    entry = "tokens"
    by_part = True

    def __init__(self, experts: Experts) -> None:
        super().__init__()
        self.dispatch, self.combine = LocalDispatch(), Combine()
        self.experts = experts

    def run_experts(
        self,
        x_ND: Tensor,
        index_NK: Tensor,
        weights_NK: Tensor,
        keep_NK: Tensor | None,
        part: Part = WHOLE,
        free: Free | None = None,
    ) -> Tensor:
        """`out_n = sum_k weight_nk expert_index_nk(x_n)` over the picks that are kept, None for all, and what is free:
        [N, D]. Of the experts it runs that part of their width."""
        experts: Rowwise = self.experts
        if part.count > 1:
            # Ranks that share experts have other parts: rows say which they are for.
            experts, index_NK = ExpertParts(self.experts, part.count), index_NK * part.count + part.index
        y_PD, places_NK = self.dispatch(x_ND, index_NK, keep_NK, experts)
        if (parts := places_NK.shape[1] // weights_NK.shape[1]) > 1:
            weights_NK = weights_NK.repeat_interleave(parts, 1)
        return self.combine(y_PD, weights_NK, places_NK, free)
