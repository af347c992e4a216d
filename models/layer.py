"""One layer: a mixer sublayer and an FFN sublayer over the state, under one depth gate.

Shape suffixes: B batch, T sequence, D model width.
"""

import itertools
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.block import Block
from models.branches import FFNBranch, MixerBranch
from models.config import LMConfig
from models.depth.base import DepthControl, Gated
from models.keeper import Keeper
from models.open_tokens import worthwhile
from models.plugin import promises
from models.slots import FFN, Cache, Mixer
from models.state import Entry, Found, Result, Side, State
from models.sublayer import AnySublayer, Passed, Sublayer


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

    `keep`: the entries that later layers still read. `keeper`: what the backward pass finds of the forward pass.
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
            shared, kind = ctx.pool.values(), getattr(own, name).kind
            setattr(self, name, Sublayer(connection, placement, branches[name], scaling, beside, shared, kind))
        self.mixer: Sublayer[MixerBranch]
        self.ffn: Sublayer[FFNBranch]
        self.key_gate = config.depth.gates_keys and own.mixer.key_gate
        self.keep: frozenset[str] = frozenset()
        self.keeper = Keeper()

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

    def changes(self) -> tuple[str, ...]:
        """Entries that no step writes, and that change nevertheless, before the mixer reads them."""
        return self.mixer.connection.stream if self.depth.adds else ()

    def forward(self, state: State, side: Side, local: Side, cache: Cache | None = None) -> tuple[State, Extras]:
        """side, local: of the whole sequence, and of this rank's tokens. cache: when decoding."""
        if cache is None and torch.is_grad_enabled():
            state, extras = self.keeper.run(self, state, side, local)
        else:
            state, extras = self.run(state, side, local, cache)
        return {name: x for name, x in state.items() if name in self.keep}, extras

    def run(self, state: State, side: Side, local: Side, cache: Cache | None = None) -> tuple[State, Extras]:
        """`forward`, with all of autograd's memory and all entries."""
        state, gates = self.gated(state, local)
        state, (mixed, channel) = self.run_branches(("mixer", "ffn"), state, side, local, gates, cache)
        losses = joined(
            self,
            (self.depth.has_losses, gates.losses),
            (self.mixer.branch.has_losses, mixed.losses),
            (self.ffn.branch.has_losses, channel.losses),
        )
        found = {"depth": gates.stats, "mixer": mixed.stats, "ffn": channel.stats}
        stats = {f"{role}.{name}": value for role, own in found.items() for name, value in own.items()}
        return state, Extras(losses, stats, mixed.cache)

    def gated(self, state: State, local: Side) -> tuple[State, Gated]:
        """The depth's decision, and the state that both branches find."""
        peek_BTD = self.mixer.connection.peek(state) if self.depth.peeks else None
        gates: Gated = self.depth(peek_BTD, {k: state[k] for k in self.depth.reads}, local)
        state = {**state, **gates.writes}
        if gates.added_BTD is not None:
            assert self.depth.adds, "it must declare that it does"
            state = self.mixer.connection.add(state, gates.added_BTD)
        return state, gates

    def run_branches(
        self, roles: tuple[str, ...], state: State, side: Side, local: Side, gates: Gated, cache: Cache | None = None
    ) -> tuple[State, list[Result]]:
        """The state behind the mixer, the FFN or both, and what each handed back."""
        results: list[Result] = []
        found: Found | None = None
        for role, behind in itertools.zip_longest(roles, roles[1:]):
            then = None if behind is None else getattr(self, behind)
            state, result, found = self.run_branch(role, state, side, local, gates, cache, found, then)
            results.append(result)
        return state, results

    def run_branch(
        self,
        role: str,
        state: State,
        side: Side,
        local: Side,
        gates: Gated,
        cache: Cache | None,
        found: Found | None,
        then: AnySublayer | None,
    ) -> Passed:
        """found, then: see `Sublayer.forward`."""
        gate_BT = gates.gate_BT
        # By name, so that whoever calls a sublayer again with another state has it find what that is read as.
        ties = {"found": found, "then": then}
        if role == "mixer":
            key_gate_BT = self.depth.key_gate(gate_BT) if gate_BT is not None and self.key_gate else None
            return self.mixer(state, side, local, gate_BT, key_gate_BT, cache, **ties)
        # What draws, such as the picks that a full expert drops, may look at the other tokens.
        alone = self.ffn.branch.skips and self.ffn.by_rank is None and not side.draws and worthwhile()
        open_BT = gate_BT if self.depth.closes and alone else None
        return self.ffn(state, side, local, gate_BT, open_BT, None, **ties)
