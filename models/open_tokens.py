"""A branch for the tokens whose gate is open alone, which are moved to the front of their rows, and back afterwards.

Without gradients only: how many tokens run depends on the data, which FLOPs and memory follow and compilers do not.
Shape suffixes: B rows, T tokens of a row, N open tokens of the row that has most.
"""

import torch
from torch import Tensor

from models.state import Side, State, Views


def worthwhile() -> bool:
    """Whether closed tokens can be left out at all."""
    return not torch.is_grad_enabled() and not torch.compiler.is_compiling()


class OpenTokens:
    """The tokens of each row that are open, in their order. Rows that have fewer than others end in padding.

    There may be none: a branch runs on them all the same, because other ranks may wait for this one inside it.
    """

    def __init__(self, gate_BT: Tensor) -> None:
        open_BT = gate_BT > 0
        self.length = gate_BT.shape[1]
        most = int(open_BT.sum(1).max())
        self.index_BN = (~open_BT).int().argsort(dim=1, stable=True)[:, :most]
        self.filled_BN = open_BT.gather(1, self.index_BN)

    def take(self, x: Tensor) -> Tensor:
        """[B, T, ...] to [B, N, ...]."""
        return x.take_along_dim(self.index_BN.reshape(*self.index_BN.shape, *(1,) * (x.dim() - 2)), dim=1)

    def put(self, x: Tensor) -> Tensor:
        """[B, N, ...] to [B, T, ...], 0 where closed."""
        places = (*self.index_BN.shape, *(1,) * (x.dim() - 2))
        own = x.masked_fill(~self.filled_BN.reshape(places), 0)
        return own.new_zeros(x.shape[0], self.length, *x.shape[2:]).scatter(
            1, self.index_BN.reshape(places).expand_as(own), own
        )

    def views(self, views: Views) -> Views:
        return views.map(self.take)

    def state(self, entries: State) -> State:
        return {name: self.take(x) for name, x in entries.items()}

    def side(self, side: Side) -> Side:
        """Of the part of the sequence that `side` narrows to."""
        documents_BT = side.documents_BT
        if documents_BT is None:
            documents_BT = torch.zeros_like(side.positions_BT)
        return Side(
            self.take(side.tokens_BT),
            self.take(side.positions_BT),
            self.take(documents_BT).masked_fill(~self.filled_BN, -1),
        )


def one_row(side: Side) -> Side:
    """All tokens of the side in a row, for what looks at each token alone."""
    documents_BT = side.documents_BT
    return Side(
        side.tokens_BT.reshape(1, -1),
        side.positions_BT.reshape(1, -1),
        None if documents_BT is None else documents_BT.reshape(1, -1),
    )
