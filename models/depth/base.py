"""The slot `depth`: the interface that its plug-ins fill.

Shape suffixes: B batch, T sequence, D model width.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from torch import Tensor, nn

from models.context import LayerContext
from models.plugin import Plugin
from models.slots import Closer
from models.state import Entry, Side, State

if TYPE_CHECKING:
    from models.config import LayerConfig


class Gated(NamedTuple):
    """What a layer's depth control decides.

    gate_BT: what both branches' outputs are multiplied by. writes, losses, stats: as in `Result`. added_BTD: what the
    stream gets before the layer reads it.
    """

    gate_BT: Tensor | None = None
    writes: Mapping[str, Tensor] = MappingProxyType({})
    losses: Mapping[str, Tensor] = MappingProxyType({})
    stats: Mapping[str, Tensor] = MappingProxyType({})
    added_BTD: Tensor | None = None


class DepthControl(nn.Module):
    """One layer's gate.

    peeks: it looks at the stream; a layer whose gate does not is spared the view, which may cost a pass over it.
    closes: its gate is exactly 0 for tokens that a layer need not run for (see `models.open_tokens`). adds: it may give
    the stream something before the layer reads it, whose entries then change under their names.
    """

    peeks: bool = True
    closes: bool = False
    adds: bool = False
    reads: tuple[str, ...] = ()
    writes: tuple[Entry, ...] = ()
    has_losses: bool = False

    def forward(self, peek_BTD: Tensor | None, inputs: State, side: Side) -> Gated:
        return Gated()

    def key_gate(self, gate_BT: Tensor) -> Tensor:
        """How much a token may be seen as a key, of a kind that gates keys."""
        return gate_BT

    def flops_per_token(self, d_model: int) -> float:
        """As of a connection."""
        return 0.0

    def after_step(self, stats: Mapping[str, Tensor]) -> None:
        """Once per optimiser step, with the step's statistics summed over all ranks and micro-batches."""


class DepthConfig(Plugin, slot="depth", folder="models.depth"):
    """Which layers run for which token.

    gates_keys: the gate also says how much a token may be seen as a key. mirrors: layer L-1-l uses layer l's gate.
    """

    gates_keys: ClassVar[bool] = False
    mirrors: ClassVar[bool] = False

    def build(self, ctx: LayerContext) -> DepthControl:
        raise NotImplementedError

    def period(self, layers: "tuple[LayerConfig, ...]") -> int:
        """The number of layers after which mixers, FFNs, their norms and scalings are the same modules again; see
        `models.block`."""
        return len(layers)

    def close(self, closer: Closer) -> Closer:
        """What the final norm reads. closer: the residual's."""
        return closer
