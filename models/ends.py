"""The two ends of a residual topology: what it makes of the embedding, and what the final norm reads.

Shape suffixes: B batch, T sequence, D model width.
"""

from torch import Tensor, nn

from models.state import Entry, State


class Opener(nn.Module):
    """From the embedding to the first state."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.writes: tuple[Entry, ...] = (Entry("x", (d_model,)),)

    def forward(self, x_BTD: Tensor) -> State:
        return {"x": x_BTD}


class Closer(nn.Module):
    """From the last state to what the final norm reads."""

    reads: tuple[str, ...] = ("x",)

    def forward(self, state: State) -> Tensor:
        return state["x"]

    def flops_per_token(self, d_model: int) -> float:
        """As of a connection."""
        return 0.0
