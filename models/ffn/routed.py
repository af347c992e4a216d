"""What all FFNs with routed experts share: which rows go where, and how their outputs come back together.

Shape suffixes: N tokens, D width, K picks of a token, P picks that are made.
"""

from collections.abc import Callable

from torch import Tensor

from models.ffn.dispatch import LocalDispatch, Rowwise
from models.ffn.experts import ExpertParts, Experts
from models.kernels.combine.reference import weighted_picks
from models.kernels.picks import Picks
from models.pieces import WHOLE, Part
from models.slots import FFN


class RoutedFFN(FFN):
    """Runs on the rank's own tokens. `dispatch` is replaced where experts are spread out."""

    entry = "tokens"
    by_part = True

    def __init__(self, experts: Experts) -> None:
        super().__init__()
        self.dispatch: Callable[[Tensor, Tensor, Rowwise], Tensor] = LocalDispatch()
        self.experts = experts

    def run_experts(
        self, x_ND: Tensor, index_NK: Tensor, weights_NK: Tensor, keep_NK: Tensor | None, part: Part = WHOLE
    ) -> Tensor:
        """`out_n = sum_k weight_nk expert_index_nk(x_n)` over the picks that are kept, [N, D], at least in float32. Of
        the experts it runs that part of their width. keep_NK: see `Picks`."""
        picks = Picks.of(keep_NK)
        return weighted_picks(self.picked(x_ND, index_NK, picks, part), weights_NK, picks)

    def picked(self, x_ND: Tensor, index_NK: Tensor, picks: Picks | None, part: Part = WHOLE) -> Tensor:
        """What its expert makes of each pick, in order, [P, D]. picks: None is all."""
        experts: Rowwise = self.experts
        if part.count > 1:
            # Ranks that share experts have other parts: rows say which they are for.
            experts, index_NK = ExpertParts(self.experts, part.count), index_NK * part.count + part.index
        if picks is None:
            return self.dispatch(x_ND.repeat_interleave(index_NK.shape[1], 0), index_NK.flatten(), experts)
        # It reads a view in which picks are distinct, so that backward adds no two gradients to one place in a race.
        rows_PD = x_ND[:, None].expand(-1, picks.slots, -1)[picks.token_P, picks.slot_P]
        return self.dispatch(rows_PD, index_NK[picks.token_P, picks.pick_P], experts)
