"""What a model's parts outside branches know of the tensor ranks that share its tokens.

Shape suffixes: B batch, T sequence.
"""

from torch import Tensor


class TensorGroup:
    """What parts outside branches exchange with the other ranks that share a tensor-parallel model's tokens. Here there
    are none; `parallel/` gives every module that has one as `group` another.

    size: how many ranks they are, of which this is number `index`.
    """

    size: int = 1
    index: int = 0

    def all_tokens(self, x_BT: Tensor) -> Tensor:
        """From this rank's tokens to all of the group's."""
        return x_BT

    def own_tokens(self, x_BT: Tensor) -> Tensor:
        """The way back, where all ranks hold the same."""
        return x_BT

    def sum(self, x: Tensor) -> Tensor:
        """Over the ranks; all get it."""
        return x

    def sum_own(self, x_BT: Tensor) -> Tensor:
        """Over the ranks, of this rank's tokens."""
        return x_BT
