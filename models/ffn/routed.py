"""What all FFNs with routed experts share: where rows go, over whom statistics are summed, what routing reports.

Shape suffixes: B batch, T sequence (this rank's share), N = B*T tokens, D width, E experts, K picks, P picks kept.
"""

from collections.abc import Callable

from torch import Tensor

from models.buffers import Buffers
from models.ffn.balance import Grouped, LocalReduce, StatsGroup, balance_terms, count_picks, group_loads
from models.ffn.dispatch import LocalDispatch
from models.ffn.experts import Experts
from models.ffn.routers import Routing
from models.params import upcast
from models.slots import FFN


class RoutedFFN(FFN, Buffers, Grouped):
    """Runs on the rank's own tokens. `dispatch` and `reduce` are replaced where experts or tokens are spread out."""

    entry = "tokens"

    def __init__(self, stats_group: StatsGroup) -> None:
        super().__init__()
        self.stats_group = stats_group
        self.dispatch: Callable[[Tensor, Tensor, Experts], Tensor] = LocalDispatch()
        self.reduce = LocalReduce()

    def balance(self, routing: Routing, valid_BT: Tensor) -> tuple[Tensor, Tensor]:
        """(`balance_terms` [E], this rank's picks of each expert [E])."""
        probs_BTE = routing.probs_BTE
        picks_BE = count_picks(routing.index_BTK, valid_BT, probs_BTE.shape[-1])
        loads_GE = group_loads(picks_BE, valid_BT, self.stats_group, self.reduce, probs_BTE.dtype)
        return balance_terms(probs_BTE, loads_GE, valid_BT), picks_BE.sum(0)


def take_picks(x_ND: Tensor, top_k: int, pick_P: Tensor) -> Tensor:
    """The token of each pick, [P, D]. pick_P: distinct indices among the N*K picks, pick n*K+k being token n's k-th.

    It reads a view in which picks are distinct, so that backward adds no two gradients to one place in a race.
    """
    x_NKD = x_ND[:, None].expand(-1, top_k, -1)
    return x_NKD[pick_P // top_k, pick_P % top_k]


def sum_picks(y_PD: Tensor, weights_NK: Tensor, pick_P: Tensor) -> Tensor:
    """`out_n = sum_k weight_nk y_nk` over the picks that are given, [N, D], at least in float32."""
    weighted_PD = upcast(y_PD) * weights_NK.flatten().index_select(0, pick_P)[:, None]
    zeros = weighted_PD.new_zeros(weights_NK.numel(), y_PD.shape[-1])
    return zeros.index_copy(0, pick_P, weighted_PD).unflatten(0, weights_NK.shape).sum(1)
