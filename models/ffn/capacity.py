"""Limited room: an expert takes so many tokens of a group, and those that come too late pass it by.

Shape suffixes: B batch, T sequence (this rank's share), R and S the rows and tokens of whole groups, K picks,
E experts, G groups of a row, M = S*K picks of a row.
"""

import torch
from torch import Tensor

from models.ffn.balance import count_picks
from models.ffn.groups import Grouped, StatsGroup
from models.ffn.routing import Routing
from models.kernels.queues import Queues
from models.kernels.queues.reference import queues
from models.state import Side


class Room(Grouped):
    """Expert e takes `numerators[e] * tokens of the group / denominator` picks, rounded down, and one at least.

    by_document: the groups of "sequence" are a row's documents, each on its own, instead of the row.
    """

    def __init__(
        self, group: StatsGroup, numerators: tuple[float, ...], denominator: float, by_document: bool = False
    ) -> None:
        super().__init__(group)
        self.numerators, self.denominator = numerators, denominator
        self.by_document = by_document and group == "sequence"
        # Documents may be as many as tokens: too many queues for counting.
        self.queues = queues if self.by_document else Queues()

    def forward(self, routing: Routing, side: Side) -> Tensor:
        """The picks that find room, bool [B, T, K]: of valid tokens, and of those that the routing keeps."""
        return side.choose(self, lambda: self.fitting(routing, side))

    @torch.no_grad()
    def fitting(self, routing: Routing, side: Side) -> Tensor:
        index_BTK, asked_BTK = routing.index_BTK, asked(routing, side)
        documents_BT = side.documents_BT if self.by_document else None
        labels_BT = side.valid_BT.long() - 1 if documents_BT is None else documents_BT
        own = torch.cat([index_BTK.where(asked_BTK, -1), labels_BT[..., None]], dim=-1)
        whole, priority = self.peers.gather(own), routing.priority_BTK
        shape, rows = whole[..., :-1].shape, 1 if self.group == "microbatch" else len(whole)
        whole = whole.reshape(rows, -1, whole.shape[-1])
        picked_RSK, labels_RS = whole[..., :-1], whole[..., -1]
        group_RS, groups = torch.zeros_like(labels_RS), 1
        if documents_BT is not None:
            group_RS = (labels_RS.diff(dim=1, prepend=labels_RS[:, :1]) != 0).cumsum(1)
            groups = labels_RS.shape[1]
        tokens_RG = labels_RS.new_zeros(rows, groups).scatter_add(1, group_RS, (labels_RS >= 0).long())
        tokens_RS1 = tokens_RG.gather(1, group_RS)[..., None]
        numerators_E = torch.tensor(self.numerators, dtype=torch.float64, device=whole.device)
        room_RSK = (numerators_E[picked_RSK.clamp_min(0)] * tokens_RS1 / self.denominator).floor().clamp_min(1)
        count = len(self.numerators)
        queue_RSK = (group_RS[..., None] * count + picked_RSK).where(picked_RSK >= 0, -1)
        queue_RM, num_queues = queue_RSK.flatten(1), groups * count
        if priority is None:
            place_RM, _ = self.queues(queue_RM, num_queues)
        else:
            order_RM = self.peers.gather(priority).reshape(rows, -1).argsort(dim=1, stable=True)
            sorted_RM, _ = self.queues(queue_RM.gather(1, order_RM), num_queues)
            place_RM = torch.empty_like(sorted_RM).scatter(1, order_RM, sorted_RM)
        fits_RSK = (place_RM.view_as(picked_RSK) < room_RSK) & (picked_RSK >= 0)
        return self.peers.own(fits_RSK.reshape(shape))

    def dropped(self, routing: Routing, fits_BTK: Tensor, side: Side) -> Tensor:
        """This rank's picks that found no room, of each expert, [E]."""
        return count_picks(routing.index_BTK, asked(routing, side) & ~fits_BTK, len(self.numerators)).sum(0)


def asked(routing: Routing, side: Side) -> Tensor:
    """The picks that want room, bool [B, T, K] or [B, T, 1]."""
    valid_BT1 = side.valid_BT[..., None]
    return valid_BT1 if routing.keep_BTK is None else routing.keep_BTK & valid_BT1
