"""A sublayer: a branch between what reads the state and what writes it.

Shape suffixes: B batch, T sequence, D model width.
"""

from collections.abc import Collection
from typing import Any, Generic, NamedTuple, TypeVar

from torch import Tensor, nn

from models.beside import Beside
from models.boundary import Boundary
from models.branches import FFNBranch, MixerBranch
from models.by_rank import ByRank, check_by_rank
from models.norms.base import Placement
from models.slots import Cache, Connection
from models.state import KEY_GATE, Found, Layout, OwnTokens, Result, Side, State

Branch = TypeVar("Branch", bound=MixerBranch | FFNBranch)


class Passed(NamedTuple):
    """The state behind a sublayer, what its branch handed back, and what the next sublayer finds, if it was asked."""

    state: State
    result: Result
    found: Found | None = None


class Sublayer(nn.Module, Generic[Branch]):
    """read -> norm -> branch -> norm -> write. `boundary`: where tensor parallelism is. shared: what layers share.
    kind: of the branch, for errors."""

    def __init__(
        self,
        connection: Connection,
        placement: Placement,
        branch: Branch,
        scaling: nn.Module,
        beside: Beside,
        shared: Collection[nn.Module],
        kind: str,
    ) -> None:
        super().__init__()
        self.connection, self.placement, self.branch, self.scaling = connection, placement, branch, scaling
        self.beside = beside
        self.boundary = Boundary()
        self.by_rank: ByRank | None = None
        if connection.by_rank is not None:
            part = branch.mixer if isinstance(branch, MixerBranch) else branch.ffn
            check_by_rank(kind, part, branch, beside, connection.by_rank)
            self.by_rank = ByRank(branch, part, connection.by_rank, shared)
        self.reads = (*connection.reads, *branch.reads, *beside.reads)
        writes = self.by_rank.entries(branch.writes) if self.by_rank else branch.writes
        self.writes = (*connection.writes, *writes, *beside.writes)
        names = [entry.name for entry in self.writes]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"two parts of a sublayer write the state entry {twice[0]!r}; rename one")

    def forward(
        self,
        state: State,
        side: Side,
        local: Side,
        gate_BT: Tensor | None,
        key_gate_BT: Tensor | None,
        cache: Cache | None,
        *,
        found: Found | None = None,
        then: "AnySublayer | None" = None,
    ) -> Passed:
        """gate_BT: what the output is multiplied by. key_gate_BT: how much a token is seen by others. found: what the
        sublayer in front found for this one. then: the one behind, which is to be told what it finds."""
        views, kept = found or self.connection.find(state, self.placement)
        inputs = {name: state[name] for name in self.branch.reads}
        if key_gate_BT is not None:
            inputs[KEY_GATE] = key_gate_BT
        view_BTD = views.q_BTD
        own = self.branch.own_tokens(views, inputs, local) if self.by_rank is None else OwnTokens()
        views, inputs = self.boundary.enter(views, {**inputs, **own.made}, dict(own.made_by_head))
        seen = (views, inputs, self.boundary.side(local), side, cache)
        result = self.branch(*seen) if self.by_rank is None else self.branch.forward_by_rank(self.by_rank, *seen)
        self.check_written(own, result)
        out_BTD = self.branch.finish(self.boundary.exit(result.out_BTD))
        out_BTD = self.scaling(self.placement.after(out_BTD))
        if gate_BT is not None:
            out_BTD = out_BTD * self.boundary.gate(gate_BT, out_BTD)
        peek_BTD = self.connection.peek(state) if self.beside.peeks else None
        earlier = {name: state[name] for name in self.beside.reads}
        out_BTD, kept_beside = self.beside(peek_BTD, view_BTD, out_BTD, earlier)
        result = result._replace(
            writes={**own.writes, **result.writes},
            losses={**own.losses, **result.losses},
            stats={**own.stats, **result.stats},
        )
        if then is None:
            after, behind = self.connection.write(state, kept, out_BTD), None
        else:
            whole = {**state, **result.writes, **kept_beside}
            after, behind = self.connection.hand_on(whole, kept, out_BTD, then.connection, then.placement)
        return Passed({**after, **result.writes, **kept_beside}, result, behind)

    def check_written(self, own: OwnTokens, result: Result) -> None:
        """Raise ValueError unless the branch wrote what it declares, where tokens and heads lie as it declares."""
        over_heads = {entry.name for entry in self.branch.writes if entry.layout is Layout.HEADS}
        over_tokens = {entry.name for entry in self.branch.writes} - over_heads
        early, late = set(own.writes), set(result.writes)
        expected = (over_tokens, over_heads) if self.branch.entry == "gathered" else (set(), over_tokens | over_heads)
        if (early, late) != expected:
            raise ValueError(
                f"a {type(self.branch).__name__} declares the entries {sorted(over_tokens)} over tokens and "
                f"{sorted(over_heads)} over heads, and writes {sorted(early)} with its own tokens and {sorted(late)} "
                "with its output; a mixer writes the former in own_tokens and the latter in project"
            )


AnySublayer = Sublayer[Any]
