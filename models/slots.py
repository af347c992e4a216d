"""The slots: the interface that a plug-in of each fills. Those of depth and norm are in `base` of their folders.

Shape suffixes: B batch, T sequence, D model width, H heads, K key and V value width of a head.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor, nn

from models.beside import Beside
from models.connection import Connection
from models.context import LayerContext
from models.costly import FUSED_ATTENTION, PRODUCTS
from models.ends import Closer, Opener
from models.params import Linear, NoOutput, ParamSpec
from models.plugin import Plugin
from models.sequence_group import SequenceGroup
from models.state import Entry, OwnTokens, Projected, Result, Side, State, Valued, Views

Cache = dict[str, Tensor]
Made = TypeVar("Made")


class Mixer(nn.Module):
    """A sequence mixer, cut where heads meet the sequence.

    own_tokens and project are token-wise, core per head along the sequence, merge token-wise. Entries over tokens are
    written by own_tokens and read by both; entries over heads are written and read by project. views: those of q, k and
    v that it reads; the others have no norm of their own. value_views: of them, those that only its values come from.
    costly: names of torch operators whose results selective memory keeps. in_place: its core can run where ranks have
    parts of the sequence, and asks `sequence` for what it needs of the others; that is None where the rank has all.
    """

    in_place: bool = False
    views: tuple[str, ...] = ("q", "k", "v")
    value_views: tuple[str, ...] = ("v",)
    costly: tuple[str, ...] = (*PRODUCTS, *FUSED_ATTENTION)
    reads: tuple[str, ...] = ()
    writes: tuple[Entry, ...] = ()
    has_losses: bool = False

    def __init__(self) -> None:
        super().__init__()
        self.sequence: SequenceGroup | None = None

    def forward(self, run: Callable[[], Made]) -> Made:
        """`run()`, which uses the parts below. FSDP gathers the parameters of a mixer that layers share meanwhile."""
        return run()

    def own_tokens(self, views: Views, inputs: State, side: Side) -> OwnTokens:
        """What happens once per token on every mesh: routers, their losses and statistics.

        Tensor ranks gather the tokens afterwards, and would count what `project` computed for all of them as often as
        there are ranks. Its parameters name no axis that is split.
        """
        return OwnTokens()

    def project(self, views: Views, inputs: State, side: Side) -> Projected:
        """On all tokens of the tensor group, for this rank's heads. inputs: the entries read, and what own_tokens
        made."""
        raise NotImplementedError

    def core_weights(self) -> dict[str, Tensor]:
        """Parameters that `core` uses, heads first: the context split hands each rank its heads' rows."""
        return {}

    def core(
        self, heads: dict[str, Tensor], weights: dict[str, Tensor], side: Side, cache: Cache | None
    ) -> tuple[Tensor, Cache | None]:
        """Mix along the whole sequence. `heads` may hold "key_gate" [B, T] in [0, 1], and in decoding "all_values"
        [B, S, H, V], of all tokens so far, so that none need be kept. `cache` None: training; {}: start decoding;
        otherwise what the last call returned. Returns ([B, T, H, V], new cache or None).

        Decoding pads short rows behind their tokens (document -1), in any call. A row's cache stays as its last token
        left it: padding moves neither state nor document, and is never seen. Without documents, every token is of
        document 0."""
        raise NotImplementedError

    def drop_values(self) -> None:
        """Lose the projection of the values, for which another layer's are taken: here the Linear `v`, which makes "v"
        and nothing else. A mixer that makes them otherwise says how. Raises ValueError where there is none."""
        own = getattr(self, "v", None)
        if not isinstance(own, Linear):
            raise ValueError(
                f"{type(self).__name__} has no projection of values that it could do without; use values that every "
                f"layer makes for itself{ValuesConfig.such_as(lambda kind: not kind.crosses_layers)}"
            )
        self.v = NoOutput(own.weight.shape[0])

    def merge(self, out_BTHV: Tensor, kept: dict[str, Tensor]) -> Tensor:
        """Token-wise, to [B, T, D]: this rank's heads' part of a sum over tensor ranks. What `finish` needs may be
        further channels."""
        raise NotImplementedError

    def finish(self, sum_BTD: Tensor) -> Tensor:
        """Token-wise, from the sum over tensor ranks to [B, T, D]; without parameters."""
        return sum_BTD

    def after_step(self, stats: Mapping[str, Tensor]) -> None:
        """Once per optimiser step, with the step's statistics summed over all ranks and micro-batches."""


class FFN(nn.Module):
    """A channel mixer: token-wise, so that decoding needs no cache; what looks at other tokens is a mixer.

    entry "gathered": it runs on all tokens of its tensor group and returns a partial sum, without losses or entries,
    which would count once per rank. "tokens": it runs on the rank's own tokens, once (routers), and returns the whole
    output. by_part: of those, one whose `forward` also takes `part`, a `models.pieces.Part`, and returns that part of a
    sum that makes the output. costly: as of a mixer.
    """

    entry: ClassVar[Literal["gathered", "tokens"]] = "gathered"
    by_part: ClassVar[bool] = False
    costly: tuple[str, ...] = PRODUCTS
    reads: tuple[str, ...] = ()
    writes: tuple[Entry, ...] = ()
    has_losses: bool = False

    def forward(self, x_BTD: Tensor, inputs: State, side: Side) -> Result:
        raise NotImplementedError

    def after_step(self, stats: Mapping[str, Tensor]) -> None:
        """Once per optimiser step, with the step's statistics summed over all ranks and micro-batches."""


class Values(nn.Module):
    """What happens to a mixer's values between `project` and `core`, and to its heads' outputs behind it. Token-wise.

    own: the mixer makes values of its own; otherwise it loses that projection, and v_BTHV has no meaning.
    """

    own: bool = True
    reads: tuple[str, ...] = ()
    writes: tuple[Entry, ...] = ()

    def forward(self, v_BTHV: Tensor, views: Views, inputs: State, side: Side, cache: Cache | None) -> Valued:
        """views, inputs, side: as `Mixer.project` sees them. cache: as for `Mixer.core`, by names of its own."""
        return Valued(v_BTHV)

    def after(self, out_BTHV: Tensor, v_BTJV: Tensor, inputs: State) -> Tensor:
        """What `merge` gets. v_BTJV: the values that `forward` gave, J dividing H."""
        return out_BTHV

    def flops_per_token(self, value_shape: tuple[int, int]) -> float:
        """As of a connection: 2 for each element of each layer's values in a sum. value_shape: (J, V), unsplit."""
        return 0.0


class MixerConfig(Plugin, slot="mixer", folder="models.mixers"):
    """Information across the sequence.

    key_gate: its core defines what a gated key is (see `models.state.KEY_GATE`). unseen: a token whose key gate is 0
    changes nothing for the others, so that they may be computed without it. by_rank: its heads do without one another,
    so that a model may be defined for tensor ranks that never add them up. grows: the fields in proportion to the
    model's width, where models of several widths are compared.
    """

    grows: ClassVar[tuple[str, ...]] = ("num_heads", "num_kv_heads", "num_value_heads")

    causal: ClassVar[bool] = True
    batch_independent: ClassVar[bool] = True
    incremental: ClassVar[bool] = True
    key_gate: ClassVar[bool] = False
    unseen: ClassVar[bool] = False
    by_rank: ClassVar[bool] = True

    def build(self, ctx: LayerContext) -> Mixer:
        raise NotImplementedError

    def value_shape(self, d_model: int) -> tuple[int, int]:
        """(heads, width) of the "v" that `Mixer.project` returns, before any split."""
        raise NotImplementedError

    def flops_per_token(self, d_model: int, sequence: int) -> float:
        """Forward FLOPs of the core, for MFU (projections are counted from their parameters); by default none are."""
        return 0.0

    def idle(self, d_model: int) -> int:
        """How many elements of its matrices a token is not multiplied with."""
        return 0


class FFNConfig(Plugin, slot="ffn", folder="models.ffn"):
    """Information across channels. grows: as of a mixer."""

    grows: ClassVar[tuple[str, ...]] = ("hidden", "shared_hidden")

    causal: ClassVar[bool] = True
    batch_independent: ClassVar[bool] = True
    incremental: ClassVar[bool] = True

    def build(self, ctx: LayerContext) -> FFN:
        raise NotImplementedError

    def active_share(self) -> float:
        """The share of its experts that a token's picks run through, for counting FLOPs."""
        return 1.0


class ResidualConfig(Plugin, slot="residual", folder="models.residual"):
    """What is kept between sublayers.

    takes_shortcut: there is one identity path, which the shortcut's module can act on. starts_plain: with its initial
    parameters it computes what plain does, but for the scale that the last norm reads. one_norm: one for both branches.
    steps: the branches of a layer that can be undone together, in order; none of a residual that cannot be undone.
    exact: undoing gives what was there, bit for bit. lands: a branch's output may be under way until its connections
    `land` it, which they do as late as they can. converted: its settings where a model that was trained with plain
    is given it.
    """

    takes_shortcut: ClassVar[bool] = True
    starts_plain: ClassVar[bool] = False
    one_norm: ClassVar[bool] = False
    steps: ClassVar[tuple[tuple[str, ...], ...]] = ()
    lands: ClassVar[bool] = False
    converted: ClassVar[Mapping[str, Any]] = MappingProxyType({})

    @property
    def exact(self) -> bool:
        return False

    def connect(self, ctx: LayerContext, branch: Literal["mixer", "ffn"], shortcut: nn.Module) -> Connection:
        raise NotImplementedError

    def open(self, d_model: int) -> Opener:
        return Opener(d_model)

    def close(self, d_model: int, num_layers: int) -> Closer:
        return Closer()

    def check_dtype(self, dtype: torch.dtype) -> None:
        """Raise ValueError where a stream of this type cannot hold what the kind keeps in it."""

    def output_gain(self) -> float:
        """Factor on the standard deviation of the branches' output matrices at initialisation."""
        return 1.0


class ValuesConfig(Plugin, slot="values", folder="models.values"):
    """What is done to value vectors across layers.

    crosses_layers: values of one layer reach others, whose heads and widths must then be equal. changes: what a mixer
    mixes are not the values that it projected, and it cannot make them again from what it projected them from.
    """

    crosses_layers: ClassVar[bool] = False
    changes: ClassVar[bool] = True

    def build(self, ctx: LayerContext, value_shape: tuple[int, int]) -> Values:
        raise NotImplementedError


class ShortcutConfig(Plugin, slot="shortcut", folder="models.shortcuts"):
    """Learned extras on the identity path. active: they change the path itself, of which there must be one."""

    active: ClassVar[bool] = True

    def build(self, ctx: LayerContext) -> nn.Module:
        """The path: [B, T, D] -> [B, T, D], token-wise."""
        raise NotImplementedError

    def beside(self, ctx: LayerContext, branch: Literal["mixer", "ffn"], path: nn.Module) -> Beside:
        """What joins the path. path: what `build` made, to share parameters with."""
        return Beside()


class ScalingConfig(Plugin, slot="scaling", folder="models.scaling"):
    """The size of what a model is made of: of branches, of embedding and logits, of initial weights, of updates.

    Sizes are the whole model's, whatever part of it a pipeline stage holds.
    """

    def build(self, ctx: LayerContext) -> nn.Module:
        """Of a branch: [B, T, D] -> [B, T, D], token-wise."""
        raise NotImplementedError

    def declared(self, spec: ParamSpec, in_layer: bool, d_model: int, num_layers: int) -> ParamSpec:
        """How a parameter is initialised and trained in a model of this size. in_layer: it is not one of the ends'."""
        return spec

    def output_gain(self, num_layers: int) -> float:
        """Factor on the standard deviation of the branches' output matrices at initialisation."""
        return 1.0

    def embedding_gain(self) -> float:
        """Factor on the embedding's output."""
        return 1.0

    def logits_gain(self, d_model: int) -> float:
        """Factor on the logits."""
        return 1.0

    def attention_gain(self, head_dim: int) -> float:
        """Factor on scores of softmax attention, beside 1 / sqrt(head_dim)."""
        return 1.0
