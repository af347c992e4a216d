"""What all FFNs with routed experts share: which rows go where, and how their outputs come back together.

Shape suffixes: N tokens, D width, K picks of a token, P picks that are made, S the most that a token makes.
"""

from collections.abc import Callable

from torch import Tensor

from models.ffn.dispatch import LocalDispatch, Rowwise
from models.ffn.experts import ExpertParts, Experts
from models.params import upcast
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
        the experts it runs that part of their width.

        keep_NK None is all. Otherwise how many they are is read on the host, since it sets the shape; on the meta
        device, which knows no numbers, they are all.
        """
        experts: Rowwise = self.experts
        if part.count > 1:
            # Ranks that share experts have other parts: rows say which they are for.
            experts, index_NK = ExpertParts(self.experts, part.count), index_NK * part.count + part.index
        if keep_NK is None or keep_NK.is_meta:
            y_MD = self.dispatch(x_ND.repeat_interleave(index_NK.shape[1], 0), index_NK.flatten(), experts)
            return (upcast(y_MD).view(*index_NK.shape, y_MD.shape[-1]) * weights_NK[..., None]).sum(1)
        token_P, pick_P = keep_NK.nonzero().unbind(1)
        slot_P = (keep_NK.cumsum(1) - 1)[token_P, pick_P]
        slots = int(slot_P.max()) + 1 if len(slot_P) else 1
        # It reads a view in which picks are distinct, so that backward adds no two gradients to one place in a race.
        rows_PD = x_ND[:, None].expand(-1, slots, -1)[token_P, slot_P]
        y_PD = self.dispatch(rows_PD, index_NK[token_P, pick_P], experts)
        weighted_PD = upcast(y_PD) * weights_NK[token_P, pick_P][:, None]
        zeros = weighted_PD.new_zeros(x_ND.shape[0] * slots, x_ND.shape[1])
        return zeros.index_copy(0, token_P * slots + slot_P, weighted_PD).unflatten(0, (-1, slots)).sum(1)
