"""The ranks over which a sequence is spread, as mixers see them that leave it there; `parallel/` has them.

Shape suffixes: B batch, T this rank's tokens, P stretches of a row that are here, S stretches of the whole row, C
tokens of a stretch, R = B * P rows of C tokens, H query heads, J key/value heads, K key and V value width.
"""

from typing import Protocol

from torch import Tensor


class SequenceGroup(Protocol):
    """A row's tokens lie in stretches of equal length, of which a rank has some, in order."""

    def rows(self, x_BT: Tensor) -> Tensor:
        """[B, P * C, ...] to [R, C, ...]: a row for each stretch."""
        ...

    def joined(self, x_RC: Tensor) -> Tensor:
        """The way back."""
        ...

    def everyone(self, x_R: Tensor) -> Tensor:
        """[S, B, ...]: what all ranks have for each stretch, in the order of the sequence."""
        ...

    def own(self, x_SB: Tensor) -> Tensor:
        """[R, ...]: of what all have, this rank's."""
        ...

    def before(self, x_RC: Tensor, width: int, fill: int = 0) -> Tensor:
        """[R, width, ...]: the tokens in front of each stretch, `fill` in front of the first."""
        ...

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
        """Softmax attention to all tokens of the group that a query may see: ([B, T, H, V], log of the sum of the
        exponentials of its scores [B, T, H]). gate_BT: of the keys, as in `as_gated_bias`. positions, documents: of
        all tokens of the group, in the order in which ranks hold them."""
        ...
