"""One layer: a mixer sublayer and an FFN sublayer over the state, under one depth gate.

Shape suffixes: B batch, T sequence, D model width, H heads, V value width.
"""

from collections.abc import Collection, Mapping
from typing import Generic, NamedTuple, TypeVar

from torch import Tensor, nn

from models.block import Block
from models.boundary import Boundary, LocalCore
from models.by_rank import ByRank, check_by_rank
from models.config import LMConfig
from models.depth.base import DepthControl, Gated
from models.open_tokens import OpenTokens, one_row, worthwhile
from models.plugin import promises
from models.slots import FFN, Beside, Cache, Connection, Mixer, Placement, Values
from models.state import ALL_VALUES, KEY_GATE, Entry, Layout, OwnTokens, Result, Side, State, Valued, Views


class Heads(NamedTuple):
    """What a mixer's core gets, and what the rest of its branch needs behind it."""

    heads: dict[str, Tensor]
    weights: dict[str, Tensor]
    kept: dict[str, Tensor]
    writes: dict[str, Tensor]
    valued: Valued


class MixerBranch(nn.Module):
    """own_tokens -> project -> values -> core -> values -> merge -> finish. unseen: see `MixerConfig`."""

    def __init__(self, mixer: Mixer, values: Values, unseen: bool = False) -> None:
        super().__init__()
        self.mixer, self.values, self.unseen = mixer, values, unseen
        # Layers that share a mixer may use its values in one of them alone.
        self.views = tuple(view for view in mixer.views if values.own or view not in mixer.value_views)
        self.run_core = LocalCore()
        self.entry = "gathered"
        self.reads = tuple(dict.fromkeys((*mixer.reads, *values.reads)))
        self.writes, self.has_losses = (*mixer.writes, *values.writes), mixer.has_losses

    def own_tokens(self, views: Views, inputs: State, side: Side) -> OwnTokens:
        if type(self.mixer).own_tokens is Mixer.own_tokens:
            return OwnTokens()  # without the call, for which FSDP would gather the parameters of a shared mixer
        return self.mixer(lambda: self.mixer.own_tokens(views, inputs, side))

    @property
    def skips(self) -> bool:
        """Whether closed tokens can be left out: they change nothing for others, and nobody reads what they write."""
        return self.unseen and self.values.own and not self.writes and not self.run_core.splits

    def open(self, views: Views, inputs: State, side: Side, cache: Cache | None) -> Result:
        """`forward` for the tokens with an open gate, KEY_GATE among the inputs; zeros for the others."""
        chosen = OpenTokens(inputs[KEY_GATE])
        own = chosen.side(side)
        result = self.run(chosen.views(views), chosen.state(inputs), own, own, cache)
        return result._replace(out_BTD=chosen.put(result.out_BTD))

    def forward(self, views: Views, inputs: State, side: Side, whole: Side, cache: Cache | None) -> Result:
        if KEY_GATE in inputs and self.skips and worthwhile():
            return self.mixer(lambda: self.open(views, inputs, side, cache))
        return self.mixer(lambda: self.run(views, inputs, side, whole, cache))

    def to_heads(self, views: Views, inputs: State, side: Side, cache: Cache | None) -> Heads:
        """The part in front of the core."""
        heads, kept, writes = self.mixer.project(views, inputs, side)
        valued: Valued = self.values(heads["v"], views, inputs, side, cache)
        heads["v"] = valued.v_BTHV
        if valued.all_BSHV is not None:
            heads[ALL_VALUES] = valued.all_BSHV
        return Heads(heads, self.mixer.core_weights(), kept, {**writes, **valued.writes}, valued)

    def from_heads(self, out_BTHV: Tensor, made: Heads, inputs: State) -> Tensor:
        """The part behind it."""
        return self.mixer.merge(self.values.after(out_BTHV, made.valued.v_BTHV, inputs), made.kept)

    def run(self, views: Views, inputs: State, side: Side, whole: Side, cache: Cache | None) -> Result:
        made = self.to_heads(views, inputs, side, cache)
        if KEY_GATE in inputs:
            made.heads[KEY_GATE] = inputs[KEY_GATE]
        out_BTHV, cache = self.run_core(self.mixer.core, made.heads, made.weights, whole, cache)
        cache = None if cache is None else {**cache, **made.valued.cache}
        return Result(self.from_heads(out_BTHV, made, inputs), made.writes, cache=cache)

    def forward_by_rank(
        self, ranks: ByRank, views: Views, inputs: State, side: Side, whole: Side, cache: Cache | None
    ) -> Result:
        """As `forward`, for each rank with its own parameters on its own input; all ranks' heads share one core."""
        return self.mixer(lambda: self.run_by_rank(ranks, views, inputs, side, whole, cache))

    def run_by_rank(
        self, ranks: ByRank, views: Views, inputs: State, side: Side, whole: Side, cache: Cache | None
    ) -> Result:
        gate, inputs = inputs.get(KEY_GATE), {name: x for name, x in inputs.items() if name != KEY_GATE}
        made, counted = [], []
        for index in ranks.each():
            own_views, own_inputs = ranks.views(views, index), ranks.over_heads(inputs, index)
            own = self.mixer.own_tokens(own_views, own_inputs, side)
            counted.append(own)
            own_inputs |= ranks.made(own, index)
            made.append(self.to_heads(own_views, own_inputs, side, ranks.cache(cache, index)))
        heads = ranks.together([one.heads for one in made], 2)
        if gate is not None:
            heads[KEY_GATE] = gate
        weights = ranks.together([one.weights for one in made], 0)
        out_BTHV, cache = self.run_core(self.mixer.core, heads, weights, whole, cache)
        outs = []
        for index, own_BTHV in zip(ranks.each(), out_BTHV.chunk(ranks.count, 2), strict=True):
            outs.append(self.from_heads(own_BTHV, made[index], ranks.over_heads(inputs, index)))
        if cache is not None:
            cache = {**cache, **ranks.caches([one.valued.cache for one in made])}
        writes = ranks.together([one.writes for one in made], 2)
        return ranks.result(outs, counted)._replace(writes=writes, cache=cache)

    def finish(self, sum_BTD: Tensor) -> Tensor:
        return self.mixer.finish(sum_BTD)


class FFNBranch(nn.Module):
    """An FFN as a branch. Raises ValueError for one that is gathered and has losses or entries.

    unseen: a token's output depends on that token alone.
    """

    def __init__(self, ffn: FFN, unseen: bool = False) -> None:
        super().__init__()
        if ffn.entry == "gathered" and (ffn.has_losses or ffn.writes):
            raise ValueError(
                f"{type(ffn).__name__} has losses or writes entries and runs on gathered tokens, where they would "
                'count once per tensor rank; say entry = "tokens"'
            )
        self.ffn, self.unseen, self.views = ffn, unseen, ("q",)
        self.entry = ffn.entry
        self.reads, self.writes, self.has_losses = ffn.reads, ffn.writes, ffn.has_losses

    @property
    def skips(self) -> bool:
        """Whether closed tokens can be left out: they change nothing for others, and nobody reads what they write."""
        return self.unseen and not self.writes and not self.has_losses

    def own_tokens(self, views: Views, inputs: State, side: Side) -> OwnTokens:
        return OwnTokens()

    def open(self, x_BTD: Tensor, inputs: State, side: Side) -> Result:
        """`forward` for the tokens with an open gate, KEY_GATE among the inputs; zeros for the others."""
        flat = {name: entry.flatten(0, 1)[None] for name, entry in inputs.items()}
        chosen = OpenTokens(flat.pop(KEY_GATE))
        side = chosen.side(one_row(side))
        result = self.ffn(chosen.take(x_BTD.flatten(0, 1)[None]), chosen.state(flat), side)
        return result._replace(out_BTD=chosen.put(result.out_BTD).view_as(x_BTD))

    def forward(self, views: Views, inputs: State, side: Side, whole: Side, cache: Cache | None) -> Result:
        if KEY_GATE in inputs:
            return self.open(views.q_BTD, inputs, side)
        return self.ffn(views.q_BTD, inputs, side)

    def forward_by_rank(
        self, ranks: ByRank, views: Views, inputs: State, side: Side, whole: Side, cache: Cache | None
    ) -> Result:
        """As `forward`, for each rank with its own parameters on its own input."""
        return ranks.run(self.ffn, views, inputs, side)

    def finish(self, sum_BTD: Tensor) -> Tensor:
        return sum_BTD


Branch = TypeVar("Branch", bound=MixerBranch | FFNBranch)


class Sublayer(nn.Module, Generic[Branch]):
    """read -> norm -> branch -> norm -> write. `boundary`: where tensor parallelism is. shared: what layers share."""

    def __init__(
        self,
        connection: Connection,
        placement: Placement,
        branch: Branch,
        scaling: nn.Module,
        beside: Beside,
        shared: Collection[nn.Module],
    ) -> None:
        super().__init__()
        self.connection, self.placement, self.branch, self.scaling = connection, placement, branch, scaling
        self.beside = beside
        self.boundary = Boundary()
        self.by_rank: ByRank | None = None
        if connection.by_rank is not None:
            part = branch.mixer if isinstance(branch, MixerBranch) else branch.ffn
            check_by_rank(part, branch, beside, connection.by_rank)
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
    ) -> tuple[State, Result]:
        """gate_BT: what the output is multiplied by. key_gate_BT: how much a token is seen by others."""
        views, kept = self.connection.read(state)
        inputs = {name: state[name] for name in self.branch.reads}
        if key_gate_BT is not None:
            inputs[KEY_GATE] = key_gate_BT
        views = self.placement.before(views)
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
        return {**self.connection.write(state, kept, out_BTD), **result.writes, **kept_beside}, result

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


def joined(layer: "Layer", *parts: tuple[bool, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """All losses of a layer, whose index only errors read: a compiler would otherwise make code for every layer.

    Each part says whether it has any, which pipeline stages plan by. Losses of one name are added, as layers' are.
    Raises ValueError when a part does not do as it says: a loss would be lost in silence.
    """
    found: dict[str, Tensor] = {}
    for declared, losses in parts:
        if bool(losses) != declared:
            raise ValueError(
                f"a part of layer {layer.index} says has_losses={declared} and returns {sorted(losses) or 'no losses'};"
                " declare what it returns"
            )
        for name, loss in losses.items():
            found[name] = found[name] + loss if name in found else loss
    return found


class Extras(NamedTuple):
    """What a layer returns beside the state."""

    losses: dict[str, Tensor]
    stats: dict[str, Tensor]
    cache: Cache | None


class Layer(nn.Module):
    """Layer `index` of the model, built from its config. pool: the modules that layers share.

    `keep`: the entries that later layers still read.
    """

    def __init__(self, config: LMConfig, index: int, pool: dict[str, nn.Module] | None = None) -> None:
        super().__init__()
        ctx, own = config.context(index, pool), config.expanded[index]
        norm = own.norm or config.norm
        self.index = index
        self.depth: DepthControl = config.depth.build(ctx)
        block = Block(ctx, config.depth.period(ctx.layers))
        values = config.values.build(ctx, own.mixer.value_shape(config.d_model))
        branches: dict[str, MixerBranch | FFNBranch] = {
            "mixer": MixerBranch(
                block.mixer(own.mixer, values.own), values, unseen=own.mixer.unseen and config.depth.gates_keys
            ),
            "ffn": FFNBranch(
                block.share("ffn", own.ffn.build), unseen=promises(own.ffn, "causal", "batch_independent")
            ),
        }
        for name in ("mixer", "ffn"):
            path = config.shortcut.build(ctx)
            connection = config.residual.connect(ctx, name, path)
            read = branches[name].views
            views = tuple(view in read for view in "qkv") if connection.num_views == 3 else (True,)
            placement = block.norms(name, norm.build(config.d_model, views), views)
            if config.residual.one_norm and name == "ffn":
                placement.share_before(self.mixer.placement)
            beside = config.shortcut.beside(ctx, name, path)
            scaling = block.share(f"{name} scaling", lambda _: config.scaling.build(ctx))
            setattr(self, name, Sublayer(connection, placement, branches[name], scaling, beside, ctx.pool.values()))
        self.mixer: Sublayer[MixerBranch]
        self.ffn: Sublayer[FFNBranch]
        self.key_gate = config.depth.gates_keys and own.mixer.key_gate
        self.keep: frozenset[str] = frozenset()

    @property
    def has_losses(self) -> bool:
        return self.depth.has_losses or self.mixer.branch.has_losses or self.ffn.branch.has_losses

    def reporting(self) -> list[tuple[str, DepthControl | Mixer | FFN]]:
        """The plug-ins that have statistics, by the name under which they are reported."""
        return [("depth", self.depth), ("mixer", self.mixer.branch.mixer), ("ffn", self.ffn.branch.ffn)]

    def events(self) -> list[tuple[tuple[str, ...], tuple[Entry, ...]]]:
        """(entries read, entries written) of each step, in order."""
        return [
            (self.depth.reads, self.depth.writes),
            (self.mixer.reads, self.mixer.writes),
            (self.ffn.reads, self.ffn.writes),
        ]

    def forward(self, state: State, side: Side, local: Side, cache: Cache | None = None) -> tuple[State, Extras]:
        peek_BTD = self.mixer.connection.peek(state) if self.depth.peeks else None
        gated: Gated = self.depth(peek_BTD, {k: state[k] for k in self.depth.reads}, local)
        state, gate_BT = {**state, **gated.writes}, gated.gate_BT
        if gated.added_BTD is not None:
            state = self.mixer.connection.add(state, gated.added_BTD)
        key_gate_BT = self.depth.key_gate(gate_BT) if gate_BT is not None and self.key_gate else None
        state, mixed = self.mixer(state, side, local, gate_BT, key_gate_BT, cache)
        # What draws, such as the picks that a full expert drops, may look at the other tokens.
        alone = self.ffn.branch.skips and self.ffn.by_rank is None and not side.draws and worthwhile()
        open_BT = gate_BT if self.depth.closes and alone else None
        state, channel = self.ffn(state, side, local, gate_BT, open_BT, None)
        losses = joined(
            self,
            (self.depth.has_losses, gated.losses),
            (self.mixer.branch.has_losses, mixed.losses),
            (self.ffn.branch.has_losses, channel.losses),
        )
        found = {"depth": gated.stats, "mixer": mixed.stats, "ffn": channel.stats}
        stats = {f"{role}.{name}": value for role, own in found.items() for name, value in own.items()}
        return {name: x for name, x in state.items() if name in self.keep}, Extras(losses, stats, mixed.cache)
