"""What flows between sublayers and across pipeline stages: a named, ordered dict of tensors.

Shape suffixes: B batch, T sequence (this rank's share of it where tokens are split), D model width, H heads.
"""

import dataclasses
import enum
from collections.abc import Callable, Hashable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

State = dict[str, Tensor]
Choose = Callable[[Hashable, Callable[[], Tensor]], Tensor]

KEY_GATE = "key_gate"  # [B, T] in [0, 1]: how much a token may be seen as a key
ALL_VALUES = "all_values"  # [B, S, H, V], in decoding: the values of all tokens so far, which others keep


class Layout(enum.Enum):
    """How a state entry lies over the ranks that split the sequence and the heads."""

    TOKENS = "tokens"  # dim 1 is the sequence, split over context and tensor ranks
    HEADS = "heads"  # dim 1 is the sequence, split over context ranks only; dim 2 is split over tensor ranks
    PER_RANK = "per_rank"  # each rank's own share of a sum


@dataclasses.dataclass(frozen=True)
class Entry:
    """One state entry as its writer declares it.

    shape: after the batch and sequence dimensions ("B", "T"), global sizes; PER_RANK entries have no such dimensions.
    heads: for Layout.HEADS, the number of heads in dim 2. dtype: None is the residual stream's own, otherwise at least
    this one (see `dtype_in`).
    """

    name: str
    shape: tuple[int, ...]
    layout: Layout = Layout.TOKENS
    heads: int | None = None
    dtype: torch.dtype | None = None

    def dtype_in(self, stream: torch.dtype) -> torch.dtype:
        """Its type where the residual stream has type `stream`: a float32 entry is float64 in a float64 model."""
        return stream if self.dtype is None else torch.promote_types(stream, self.dtype)


class Views(NamedTuple):
    """What a branch reads: the inputs of its query, key and value paths.

    One tensor unless the topology mixes them apart.
    """

    q_BTD: Tensor
    k_BTD: Tensor
    v_BTD: Tensor

    @classmethod
    def same(cls, x_BTD: Tensor) -> "Views":
        return cls(x_BTD, x_BTD, x_BTD)

    def map(self, function: Callable[[Tensor], Tensor]) -> "Views":
        """Apply `function` to each distinct tensor once."""
        # By identity, not by a table of ids, for which a compiler would make new code at every call.
        q_BTD = function(self.q_BTD)
        k_BTD = q_BTD if self.k_BTD is self.q_BTD else function(self.k_BTD)
        if self.v_BTD is self.q_BTD:
            return Views(q_BTD, k_BTD, q_BTD)
        return Views(q_BTD, k_BTD, k_BTD if self.v_BTD is self.k_BTD else function(self.v_BTD))


class Found(NamedTuple):
    """What a sublayer finds in the state: what its branch reads, normed, and what its connection's `write` needs."""

    views: Views
    kept: State


class Result(NamedTuple):
    """What a branch hands back.

    out_BTD: its output. writes: new state entries. losses: this rank's share of sums over tokens, already weighted;
    the caller divides everything by one global token count. stats: detached sums, counted once.
    cache: what decoding needs next time, or None.
    """

    out_BTD: Tensor
    writes: Mapping[str, Tensor] = MappingProxyType({})
    losses: Mapping[str, Tensor] = MappingProxyType({})
    stats: Mapping[str, Tensor] = MappingProxyType({})
    cache: dict[str, Tensor] | None = None


class OwnTokens(NamedTuple):
    """What a mixer made of this rank's own tokens; see `Mixer.own_tokens`.

    made: for `project`, [B, T, ...] each. made_by_head: likewise, [B, T, H, ...] each for all heads; `project` gets
    those of this rank. writes: entries over tokens. losses, stats: as in `Result`.
    """

    made: Mapping[str, Tensor] = MappingProxyType({})
    made_by_head: Mapping[str, Tensor] = MappingProxyType({})
    writes: Mapping[str, Tensor] = MappingProxyType({})
    losses: Mapping[str, Tensor] = MappingProxyType({})
    stats: Mapping[str, Tensor] = MappingProxyType({})


class Projected(NamedTuple):
    """What `Mixer.project` returns.

    heads: the core's inputs, each [B, T, H, ...] or [B, T], "v" among them. kept: what only `merge` needs.
    writes: entries over heads.
    """

    heads: dict[str, Tensor]
    kept: dict[str, Tensor]
    writes: Mapping[str, Tensor] = MappingProxyType({})


class Valued(NamedTuple):
    """What `Values.forward` returns.

    v_BTHV: the values of the tokens at hand. writes: entries over heads. cache: what decoding needs next time.
    all_BSHV: in decoding, the values of all tokens so far, where they are kept for all layers at one place.
    """

    v_BTHV: Tensor
    writes: Mapping[str, Tensor] = MappingProxyType({})
    cache: Mapping[str, Tensor] = MappingProxyType({})
    all_BSHV: Tensor | None = None


@dataclasses.dataclass(frozen=True)
class Side:
    """What every stage knows by itself: token ids, document ids and positions, all [B, T], of the whole sequence.

    documents is None when every row is one document; id -1 marks padding. A `window` (start, length) narrows the
    properties below to the part of the sequence that the caller holds; the fields stay whole. keys: int64 [B], below
    2^32, what each row's random draws are made from (`models.noise`); None where nothing is drawn. choices: stands
    between a layer and its discrete choices, where it may run again (`models.choices`). order: int64 [T], the place in
    the sequence of each token where the fields hold them in another order.
    """

    tokens: Tensor
    positions: Tensor
    documents: Tensor | None = None
    window: tuple[int, int] | None = None
    keys: Tensor | None = None
    choices: Choose | None = None
    order: Tensor | None = None

    @property
    def draws(self) -> bool:
        """Whether random draws are made: in training."""
        return self.keys is not None

    def with_keys(self, keys: Tensor) -> "Side":
        return dataclasses.replace(self, keys=keys)

    def choose(self, owner: Hashable, make: Callable[[], Tensor]) -> Tensor:
        """What `make` chooses: indices or masks without gradients, which a near tie may turn over. owner: the part that
        chooses."""
        return make() if self.choices is None else self.choices(owner, make)

    def narrow(self, start: int, length: int) -> "Side":
        offset = self.window[0] if self.window else 0
        return dataclasses.replace(self, window=(offset + start, length))

    def ordered(self, order: Tensor) -> "Side":
        """With the tokens in another order; see `order`."""
        documents = None if self.documents is None else self.documents[:, order]
        return dataclasses.replace(
            self, tokens=self.tokens[:, order], positions=self.positions[:, order], documents=documents, order=order
        )

    def held(self, x_BT: Tensor) -> Tensor:
        """Of [B, T, ...] of the whole sequence, in its order, what the tokens of this side have."""
        return self._windowed(x_BT if self.order is None else x_BT[:, self.order])

    @property
    def index_T(self) -> Tensor:
        """The place in the sequence of each token of this side."""
        index = torch.arange(self.tokens.shape[1], device=self.tokens.device)[None]
        return self.held(index)[0]

    def _windowed(self, x_BT: Tensor) -> Tensor:
        return x_BT.narrow(1, *self.window) if self.window else x_BT

    @property
    def tokens_BT(self) -> Tensor:
        return self._windowed(self.tokens)

    @property
    def positions_BT(self) -> Tensor:
        return self._windowed(self.positions)

    @property
    def documents_BT(self) -> Tensor | None:
        return None if self.documents is None else self._windowed(self.documents)

    @property
    def valid_BT(self) -> Tensor:
        """False at padding."""
        documents_BT = self.documents_BT
        return torch.ones_like(self.tokens_BT, dtype=torch.bool) if documents_BT is None else documents_BT >= 0
