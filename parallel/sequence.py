"""A sequence spread over context ranks, for mixers that leave it there: `models.sequence_group` over a process group.

Shape suffixes: B batch, T this rank's tokens, P = 2 stretches here, S stretches of all ranks, C tokens of a stretch,
R = B * P rows, H query heads, J key/value heads, K key and V value width.
"""

import torch
from torch import Tensor

from models.sequence_group import SequenceGroup
from parallel.collectives import gather
from parallel.ranks import Ranks
from parallel.ring import Reach, Ring, stretches


class RankSequence(SequenceGroup):
    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._own = stretches(ranks.index, ranks.size)
        held = [number for rank in range(ranks.size) for number in stretches(rank, ranks.size)]
        self._places = [held.index(number) for number in range(len(held))]

    def rows(self, x_BT: Tensor) -> Tensor:
        return x_BT.unflatten(1, (len(self._own), -1)).flatten(0, 1)

    def joined(self, x_RC: Tensor) -> Tensor:
        return x_RC.unflatten(0, (-1, len(self._own))).flatten(1, 2)

    def everyone(self, x_R: Tensor) -> Tensor:
        x_PB = x_R.unflatten(0, (-1, len(self._own))).transpose(0, 1)
        return gather(x_PB, 0, self._ranks)[self._places]

    def own(self, x_SB: Tensor) -> Tensor:
        return x_SB[list(self._own)].transpose(0, 1).flatten(0, 1)

    def before(self, x_RC: Tensor, width: int, fill: int = 0) -> Tensor:
        # Stretches may be shorter than what a convolution sees.
        kept = min(width, x_RC.shape[1])
        ends_SBC = self.everyone(x_RC[:, x_RC.shape[1] - kept :])
        ends = torch.cat([ends_SBC.new_full((ends_SBC.shape[1], width, *ends_SBC.shape[3:]), fill), *ends_SBC], 1)
        return self.own(torch.stack([ends[:, kept * number :][:, :width] for number in range(len(ends_SBC))]))

    @torch.compiler.disable()
    def attend(
        self,
        q_BTHK: Tensor,
        k_BTJK: Tensor,
        v_BTJV: Tensor,
        gate_BT: Tensor | None,
        positions_BT: Tensor,
        documents_BT: Tensor | None,
        window: int | None,
    ) -> tuple[Tensor, Tensor]:
        reach = Reach(self._ranks, positions_BT, documents_BT, window)
        return Ring.apply(q_BTHK, k_BTJK, v_BTJV, gate_BT, reach)
