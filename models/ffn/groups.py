"""Groups of tokens that routing looks at together, and the ranks over which a group may be spread.

Shape suffixes: B batch, T sequence (this rank's share).
"""

from typing import Literal

from torch import Tensor, nn

StatsGroup = Literal["sequence", "microbatch"]


class Peers:
    """The ranks that hold tokens of the same groups. This one: there are no others."""

    def sum(self, x: Tensor) -> Tensor:
        """Over the ranks, without gradient."""
        return x

    def gather(self, x_BT: Tensor) -> Tensor:
        """All tokens of this rank's groups, [rows, tokens of a row, ...], without gradient."""
        return x_BT

    def own(self, x_BT: Tensor) -> Tensor:
        """Of what `gather` made, this rank's tokens."""
        return x_BT


class Grouped(nn.Module):
    """Looks at groups of tokens: "sequence" is one row of the batch, "microbatch" all rows. `peers` is replaced where
    tokens are spread out."""

    def __init__(self, group: StatsGroup = "sequence") -> None:
        super().__init__()
        self.group: StatsGroup = group
        self.peers = Peers()

    def by_group(self, sums_B: Tensor) -> Tensor:
        """From sums over this rank's tokens of each row to those of each group: [G, ...], G is B or 1."""
        return sums_B if self.group == "sequence" else sums_B.sum(0, keepdim=True)
