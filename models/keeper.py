"""What the backward pass finds of a layer's forward pass. The default is all that autograd saves."""

from typing import TYPE_CHECKING

from models.state import Side, State

if TYPE_CHECKING:
    from models.layer import Extras, Layer


class Keeper:
    """Stands between a layer and its computation, in training. The slot `memory` has the others.

    apart: something else waits for gradients to arrive at parameters of the layer, as units of FSDP within it do.
    across: the layer's branches add up or exchange numbers across ranks.
    """

    apart: bool = False
    across: bool = False

    def run(self, layer: "Layer", state: State, side: Side, local: Side) -> "tuple[State, Extras]":
        return layer.run(state, side, local)
