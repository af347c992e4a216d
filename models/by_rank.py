"""Running branches as the tensor ranks would that a model is defined for, each on an input of its own.

What a branch has once per token (routers, their losses and picks, entries over tokens), it has once per token and rank.
Shape suffixes: B batch, T sequence, R ranks that are here, D model width, H heads.
"""

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from models.params import Axis, ParamSpec, named_specs
from models.pieces import TENSOR_AXES, WHOLE, WIDTH_AXIS, Part, as_rank, cut, fits, named_axes, split
from models.slots import FFN, Beside, Cache, Mixer, MixerConfig, ValuesConfig
from models.state import Entry, Layout, OwnTokens, Result, Side, State, Views


class ByRank:
    """The ranks of a branch that are here: all, or those of one of the processes that share them, `held`.

    shared: the modules that layers share, whose parameters are there during their calls only. A mixer is called around
    the parts of all ranks.
    """

    def __init__(self, branch: nn.Module, part: Mixer | FFN, ranks: int, shared: Collection[nn.Module]) -> None:
        self.branch, self.ranks, self.held = branch, ranks, WHOLE
        self.called = frozenset(shared) - ({part} if isinstance(part, Mixer) else set())

    @property
    def count(self) -> int:
        return self.ranks // self.held.count

    def part(self, index: int) -> Part:
        """Which rank of all the index-th one here is."""
        return Part(self.held.index * self.count + index, self.ranks)

    def each(self) -> Iterator[int]:
        """The ranks here; while one is at hand, the branch has that rank's parameters."""
        for index in range(self.count):
            with as_rank(self.branch, self.part(index), self.held, self.called):
                yield index

    def elements(self, whole: Tensor, spec: ParamSpec) -> int:
        """Of the parts that all ranks have of a parameter: what is not split counts once for every rank's stream."""
        return sum(cut(whole, spec, Part(index, self.ranks)).numel() for index in range(self.ranks))

    def views(self, views: Views, index: int) -> Views:
        return views.map(lambda view_BTRD: view_BTRD[..., index, :])

    def over_heads(self, inputs: State, index: int) -> State:
        """Of entries over heads, those of the rank's heads."""
        return {name: x_BTH.chunk(self.count, 2)[index] for name, x_BTH in inputs.items()}

    def over_tokens(self, inputs: State, index: int) -> State:
        """Of entries over tokens, the rank's own."""
        return {name: x_BTR[:, :, index] for name, x_BTR in inputs.items()}

    def made(self, own: OwnTokens, index: int) -> State:
        """What a rank made of its tokens for itself."""
        made = dict(own.made)
        for name, x_BTH in own.made_by_head.items():
            heads, part = x_BTH.shape[2], self.part(index)
            first, length, _ = split(Axis("kv_heads", heads), heads, part.index, part.count)
            made[name] = x_BTH.narrow(2, first, length)
        return made

    def cache(self, cache: Cache | None, index: int) -> Cache | None:
        """What the rank's values keep for decoding."""
        prefix = f"{index}."
        return cache and {name.removeprefix(prefix): x for name, x in cache.items() if name.startswith(prefix)}

    def caches(self, made: list[Mapping[str, Tensor]]) -> Cache:
        return {f"{index}.{name}": x for index, own in enumerate(made) for name, x in own.items()}

    def together(self, made: Sequence[Mapping[str, Tensor]], dim: int) -> dict[str, Tensor]:
        return {name: torch.cat([own[name] for own in made], dim) for name in made[0]}

    def run(self, ffn: FFN, views: Views, inputs: State, side: Side) -> Result:
        made: list[Result] = []
        for index in self.each():
            part = {"part": self.part(index)} if ffn.by_part else {}
            own_BTD = self.views(views, index).q_BTD
            made.append(ffn(own_BTD, self.over_tokens(inputs, index), side, **part))
        writes = {name: torch.stack([one.writes[name] for one in made], 2) for name in made[0].writes}
        return self.result([one.out_BTD for one in made], made)._replace(writes=writes)

    def result(self, outs: Sequence[Tensor], counted: Sequence[Result | OwnTokens]) -> Result:
        """Their outputs, the mean of their losses (this process's share of it), and the sum of their statistics."""
        losses = {name: torch.stack([own.losses[name] for own in counted]).sum(0) for name in counted[0].losses}
        stats = {name: torch.stack([own.stats[name] for own in counted]).sum(0) for name in counted[0].stats}
        losses = {name: loss / self.ranks for name, loss in losses.items()}
        return Result(torch.stack(list(outs), -2), losses=losses, stats=stats)

    def entries(self, writes: tuple[Entry, ...]) -> tuple[Entry, ...]:
        """As the state has them: where there is one per token, there is one per rank, who are laid out as heads are."""
        return tuple(
            dataclasses.replace(entry, shape=(self.ranks, *entry.shape), layout=Layout.HEADS, heads=self.ranks)
            if entry.layout is Layout.TOKENS
            else entry
            for entry in writes
        )


def check_by_rank(kind: str, part: Mixer | FFN, branch: nn.Module, beside: Beside, ranks: int) -> None:
    """Raise ValueError for a branch that has no part for each of so many ranks."""
    who = f"a residual that gives each of {ranks} tensor ranks a stream of its own"
    writes = cast(tuple[Entry, ...], branch.writes)
    if isinstance(part, FFN) and part.entry == "tokens" and not part.by_part:
        raise ValueError(
            f"{kind} runs on whole tokens and does not say by_part, and {who} has only parts; use another ffn, or let "
            "its forward return one part of its output"
        )
    if isinstance(part, Mixer):
        others = MixerConfig.such_as(lambda kind: kind.by_rank)
        if type(part).finish is not Mixer.finish:
            raise ValueError(
                f"{kind} needs a number from all heads, and {who} never adds them up; use a mixer whose heads do "
                f"without{others}"
            )
        if any(entry.layout is Layout.TOKENS for entry in part.writes):
            raise ValueError(
                f"{kind} writes an entry that tokens have once, and {who} has each token {ranks} times; use a mixer "
                f"that writes none{others}"
            )
    if type(beside) is not Beside:
        raise ValueError(f"a shortcut joins one identity path, and {who} has many; leave the shortcut out")
    axes = [axis for _, _, _, spec in named_specs(branch) for axis in named_axes(spec)]
    split_axes = (*TENSOR_AXES, WIDTH_AXIS)
    if uneven := [axis for axis in axes if axis.name in split_axes and not fits(axis, ranks)]:
        raise ValueError(
            f"{who} needs that number to divide the {uneven[0].groups} {uneven[0].name} of {kind}; change one of them"
        )
    gathered = isinstance(part, Mixer) or part.entry == "gathered"
    if gathered and not {axis.name for axis in axes} & set(TENSOR_AXES):
        raise ValueError(f"{kind} names no axis that can be split over tensor ranks, which {who} needs")
    if few := [entry for entry in writes if entry.layout is Layout.HEADS and (entry.heads or 0) % ranks]:
        own = ValuesConfig.such_as(lambda kind: not kind.crosses_layers)
        raise ValueError(
            f"{few[0].name} of a layer has {few[0].heads} heads, and {who} makes values of its own for every rank; "
            f"give the mixer a multiple of {ranks} value heads, or use values that stay in their layer{own}"
        )
