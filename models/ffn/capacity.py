"""Limited room: an expert takes so many tokens of a group, and those that come too late pass it by.

Shape suffixes: B batch, T sequence (this rank's share), R and S the rows and tokens of whole groups, K picks,
E experts, G = R*S groups at most, M = R*S*K picks.
"""

import torch
from torch import Tensor

from models.ffn.balance import count_picks
from models.ffn.groups import Grouped, StatsGroup
from models.ffn.routing import Routing
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

    def forward(self, routing: Routing, side: Side) -> Tensor:
        """The picks that find room, bool [B, T, K]: of valid tokens, and of those that the routing keeps."""
        return side.choose(self, lambda: self.fitting(routing, side))

    @torch.no_grad()
    def fitting(self, routing: Routing, side: Side) -> Tensor:
        index_BTK, asked_BTK = routing.index_BTK, asked(routing, side)
        labels_BT = side.valid_BT.long() - 1
        if self.by_document and side.documents_BT is not None:
            labels_BT = side.documents_BT
        own = torch.cat([index_BTK.where(asked_BTK, -1), labels_BT[..., None]], dim=-1)
        whole = self.peers.gather(own)
        priority_M = None if routing.priority_BTK is None else self.peers.gather(routing.priority_BTK).flatten()
        picked_RSK, labels_RS = whole[..., :-1], whole[..., -1]
        group_RS1 = self.numbers(labels_RS)[..., None]
        counted_G = (labels_RS >= 0).long().flatten()
        tokens_G = torch.zeros_like(counted_G).scatter_add(0, group_RS1.flatten(), counted_G)
        expert_RSK = picked_RSK.clamp_min(0)
        numerators_E = torch.tensor(self.numerators, dtype=torch.float64, device=whole.device)
        room_RSK = (numerators_E[expert_RSK] * tokens_G[group_RS1] / self.denominator).floor().clamp_min(1)
        count = len(self.numerators)
        queue_RSK = (group_RS1 * count + expert_RSK).where(picked_RSK >= 0, group_RS1.numel() * count)
        place_RSK = places(queue_RSK.flatten(), priority_M).view_as(picked_RSK)
        return self.peers.own((place_RSK < room_RSK) & (picked_RSK >= 0))

    def dropped(self, routing: Routing, fits_BTK: Tensor, side: Side) -> Tensor:
        """This rank's picks that found no room, of each expert, [E]."""
        return count_picks(routing.index_BTK, asked(routing, side) & ~fits_BTK, len(self.numerators)).sum(0)

    def numbers(self, labels_RS: Tensor) -> Tensor:
        """The number of each token's group, below R*S."""
        if self.group == "microbatch":
            return torch.zeros_like(labels_RS)
        rows, length = labels_RS.shape
        first_R1 = torch.arange(rows, device=labels_RS.device)[:, None] * length
        if not self.by_document:
            return first_R1.expand_as(labels_RS)
        starts_RS = labels_RS.diff(dim=1, prepend=labels_RS[:, :1]) != 0
        return first_R1 + starts_RS.cumsum(1)


def asked(routing: Routing, side: Side) -> Tensor:
    """The picks that want room, bool [B, T, K] or [B, T, 1]."""
    valid_BT1 = side.valid_BT[..., None]
    return valid_BT1 if routing.keep_BTK is None else routing.keep_BTK & valid_BT1


def places(queue_M: Tensor, priority_M: Tensor | None) -> Tensor:
    """How many of the same queue come before: those of smaller priority, and of equal ones the earlier."""
    order_M = queue_M.argsort(stable=True) if priority_M is None else priority_M.argsort(stable=True)
    if priority_M is not None:
        order_M = order_M[queue_M[order_M].argsort(stable=True)]
    sorted_M = queue_M[order_M]
    place_M = torch.arange(len(order_M), device=order_M.device) - torch.searchsorted(sorted_M, sorted_M)
    return torch.empty_like(place_M).scatter(0, order_M, place_M)
