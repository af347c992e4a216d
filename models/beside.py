"""The side of a shortcut that is not the identity path.

Shape suffixes: B batch, T sequence, D model width.
"""

from torch import Tensor, nn

from models.state import Entry, State


class Beside(nn.Module):
    """What a shortcut does to what a sublayer adds to the identity path. Token-wise, after norm, scaling and gate.

    peeks: it looks at the stream; others are spared the view, which may cost a pass over it.
    """

    peeks: bool = False
    reads: tuple[str, ...] = ()
    writes: tuple[Entry, ...] = ()

    def forward(self, x_BTD: Tensor | None, view_BTD: Tensor, out_BTD: Tensor, inputs: State) -> tuple[Tensor, State]:
        """x_BTD: the connection's `peek` before the sublayer. view_BTD: what the branch read, normed. out_BTD: what it
        made of it. Returns what joins the path, and entries."""
        return out_BTD, {}

    def flops_per_token(self, d_model: int) -> float:
        """As of a connection. Parameters that the path has too are counted in both."""
        return 0.0
