"""A mixer and an FFN as the branches that sublayers run.

Shape suffixes: B batch, T sequence, D model width, H heads, V value width.
"""

from typing import NamedTuple

from torch import Tensor, nn

from models.boundary import LocalCore
from models.by_rank import ByRank
from models.open_tokens import OpenTokens, one_row, worthwhile
from models.slots import FFN, Cache, Mixer, Values
from models.state import ALL_VALUES, KEY_GATE, OwnTokens, Result, Side, State, Valued, Views


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
