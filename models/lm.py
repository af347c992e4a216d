"""The language model: embedding, layers over a state, head. Knows nothing of processes or devices.

Parts outside a pipeline stage are None, and forward passes through them; layers keep their global index as name.
Shape suffixes: B batch, T sequence, D model width, V vocabulary.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from models.boundary import Ends
from models.config import LMConfig
from models.layer import Extras, Layer
from models.loss import Vocabulary, count_targets
from models.noise import of_layer
from models.params import named_specs
from models.rules import check
from models.slots import Cache, Closer, Opener
from models.state import Entry, Layout, Side, State

LOSSES = Entry("losses", (1,), Layout.PER_RANK, dtype=torch.float32)


class Output(NamedTuple):
    """What `LM.forward` returns.

    loss: this rank's share of the sum over tokens of all losses (with targets). token_loss: the cross-entropy part,
    detached. count: this rank's valid targets. losses, stats: detached sums by name. logits: without targets.
    state: when the head lies on a later stage. cache: by layer, of those that are present, when decoding.
    """

    loss: Tensor | None = None
    token_loss: Tensor | None = None
    count: Tensor | None = None  # pyright: ignore[reportIncompatibleMethodOverride]
    losses: Mapping[str, Tensor] = MappingProxyType({})
    stats: Mapping[str, Tensor] = MappingProxyType({})
    logits: Tensor | None = None
    state: State | None = None
    cache: dict[str, Cache] | None = None


def whole(side: Side) -> Side:
    return side


def run_layers(
    layers: list[Layer], entries: State, side: Side, local: Side, cache: dict[str, Cache] | None
) -> tuple[State, list[Extras]]:
    """One after another."""
    made = []
    for layer in layers:
        # The layer's own keys are made here: a compiler would take an index within it as a reason for new code.
        sides = of_layer(side, layer.index), of_layer(local, layer.index)
        entries, extras = layer(entries, *sides, None if cache is None else cache.get(str(layer.index), {}))
        made.append(extras)
    return entries, made


class LM(nn.Module):
    """Build with parameters on the meta device (`with torch.device("meta")`), then initialise; see `models.params`."""

    def __init__(self, config: LMConfig) -> None:
        super().__init__()
        check(config)
        self.config = config
        d_model, depth = config.d_model, len(config.expanded)
        self.embed: Vocabulary | None = Vocabulary(config.vocab_size, d_model, "embedding")
        self.embed_norm: nn.Module | None = config.norm.embedding(d_model)
        self.opener: Opener | None = config.residual.open(d_model)
        pool: dict[str, nn.Module] = {}
        self.layers = nn.ModuleDict({str(index): Layer(config, index, pool) for index in range(depth)})
        self.closer: Closer | None = config.depth.close(config.residual.close(d_model, depth))
        self.norm: nn.Module | None = config.norm.final(d_model)
        self.head: Vocabulary | None = self.embed
        if not config.tie_embeddings:
            self.head = Vocabulary(config.vocab_size, d_model, "head")
        self.shard: Callable[[Side], Side] = whole
        self.ends = Ends()
        self.run_layers = run_layers
        self.embedding_gain, self.logits_gain = config.scaling.embedding_gain(), config.scaling.logits_gain(d_model)
        for name, module, attribute, spec in named_specs(self):
            scaled = config.scaling.declared(spec, name.startswith("layers."), d_model, depth)
            module.__dict__["param_specs"][attribute] = scaled
        self.boundaries = self._boundaries()
        self.owners = owners(self)
        self.reports = reports(self)
        self.register_state_dict_post_hook(drop_copies)
        self.register_load_state_dict_pre_hook(add_copies)

    @property
    def blocks(self) -> list[Layer]:
        """The layers that are present, in order."""
        return cast(list[Layer], list(self.layers.values()))

    def prune(self, start: int, stop: int) -> None:
        """Keep layers start..stop-1, with the embedding if they are the first and the head if they are the last.

        What is shared with a part that goes away stays as a copy; `owners` says whose.
        """
        depth = len(self.layers)
        for index in range(depth):
            if not start <= index < stop:
                del self.layers[str(index)]
        if stop < depth:
            self.norm = self.head = self.closer = None
        if start > 0:
            self.embed = self.embed_norm = self.opener = None

    def _boundaries(self) -> list[list[Entry]]:
        """The entries alive before layer 0, 1, ..., and after the last: those that are read before they are written."""
        assert self.opener is not None and self.closer is not None
        layers = self.blocks
        live: list[set[str]] = [set(self.closer.reads)]
        for layer in reversed(layers):
            alive = set(live[0])
            for reads, writes in reversed(layer.events()):
                alive = (alive - {entry.name for entry in writes}) | set(reads)
            live.insert(0, alive)
        for layer, alive in zip(layers, live[1:], strict=True):
            layer.keep = frozenset(alive)
        known = {entry.name: entry for entry in self.opener.writes}
        boundaries = [[entry for name, entry in known.items() if name in live[0]]]
        has_losses = False
        for layer, alive in zip(layers, live[1:], strict=True):
            known |= {entry.name: entry for _, writes in layer.events() for entry in writes}
            has_losses |= layer.has_losses
            boundary = [entry for name, entry in known.items() if name in alive]
            boundaries.append([*boundary, LOSSES] if has_losses else boundary)
        return boundaries

    def forward(
        self,
        tokens_BT: Tensor,
        targets_BT: Tensor | None = None,
        *,
        documents_BT: Tensor | None = None,
        positions_BT: Tensor | None = None,
        keys_B: Tensor | None = None,
        state: State | None = None,
        cache: dict[str, Cache] | None = None,
        keep_BK: Tensor | None = None,
    ) -> Output:
        """Run the parts that are present.

        tokens_BT, targets_BT (-100: no target), documents_BT (-1: padding), positions_BT (default: the index in the
        row): int64, the whole sequence on every stage and rank. keys_B: of the rows' random draws (`models.noise`),
        without which none are made. state: from the previous stage. cache: {} to start decoding (with positions_BT),
        then what the last call returned. keep_BK: indices of the K tokens of each row whose logits are wanted
        (default: all).
        """
        if positions_BT is None:
            positions_BT = torch.arange(tokens_BT.shape[1], device=tokens_BT.device).expand_as(tokens_BT)
        side = Side(tokens_BT, positions_BT, documents_BT, keys=keys_B)
        local = self.shard(side)
        if self.embed is not None and self.embed_norm is not None and self.opener is not None:
            x_BTD = self.embed(local.tokens_BT)
            if self.embedding_gain != 1:
                x_BTD = x_BTD * self.embedding_gain
            state = self.opener(self.embed_norm(x_BTD))
        assert state is not None, "a stage without the embedding needs the previous stage's state"
        entries: State = dict(state)
        total = entries.pop(LOSSES.name, None)
        losses: dict[str, Tensor] = {}
        stats: dict[str, Tensor] = {}
        caches: dict[str, Cache] | None = None if cache is None else {}
        entries, made = self.run_layers(self.blocks, entries, side, local, cache)
        for layer, extras in zip(self.blocks, made, strict=True):
            name = str(layer.index)
            for key, loss in extras.losses.items():
                total = loss.reshape(1) if total is None else total + loss.reshape(1)
                losses[key] = losses.get(key, 0) + loss.detach()
            stats |= {f"layers.{name}.{key}": value for key, value in extras.stats.items()}
            if caches is not None and extras.cache is not None:
                caches[name] = extras.cache
        if self.head is None or self.norm is None or self.closer is None:
            entries = self.ends.leave(entries)
            entries = entries if total is None else {**entries, LOSSES.name: total}
            return Output(losses=losses, stats=stats, state=entries, cache=caches)
        entries, local = self.ends.close(entries, local)
        h_BTD = self.norm(self.closer(entries))
        if self.logits_gain != 1:
            h_BTD = h_BTD * self.logits_gain
        if targets_BT is None:
            if keep_BK is not None:
                h_BTD = h_BTD.take_along_dim(keep_BK[..., None], dim=1)
            return Output(logits=self.head.logits(h_BTD), cache=caches)
        targets_BT = local.held(targets_BT)
        loss = self.head.loss(h_BTD, targets_BT)
        total_loss = loss if total is None else loss + total[0]
        return Output(total_loss, loss.detach(), count_targets(targets_BT), losses, stats)

    def after_step(self, stats: Mapping[str, Tensor]) -> None:
        """Hand each plug-in its statistics of the whole step, summed over its places (bias balancing, controllers)."""
        sums: dict[str, dict[str, Tensor]] = {}
        for key, value in stats.items():
            *place, name = key.split(".", 3)
            if (part := self.reports.get(".".join(place))) is not None:
                own = sums.setdefault(part, {})
                own[name] = own[name] + value if name in own else value
        parts = {self.reports[f"layers.{x.index}.{role}"]: part for x in self.blocks for role, part in x.reporting()}
        for place, part in parts.items():
            part.after_step(sums.get(place, {}))


def owners(model: nn.Module) -> dict[str, str]:
    """For modules that are registered at several places: the names at later places, and those at the first, which own.

    This is all there is to sharing parameters: tied embeddings, blocks and branches that layers have in common.
    """
    first: dict[nn.Module, str] = {}
    found: dict[str, str] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        owner = first.setdefault(module, path)
        if owner != path:
            for tensors in (module.named_parameters(recurse=False), module.named_buffers(recurse=False)):
                found |= {f"{path}.{name}": f"{owner}.{name}" for name, _ in tensors}
    return found


def reports(model: LM) -> dict[str, str]:
    """For every place at which statistics are reported, the first place of the plug-in that does: stages that hold its
    copies all update them, by the statistics of all places."""
    first: dict[nn.Module, str] = {}
    places = [(f"layers.{layer.index}.{role}", part) for layer in model.blocks for role, part in layer.reporting()]
    return {place: first.setdefault(part, place) for place, part in places}


def drop_copies(model: nn.Module, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    """A shared tensor is saved under its owner's name only."""
    for name in cast(LM, model).owners:
        state.pop(prefix + name, None)


def add_copies(model: nn.Module, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    """And it is loaded wherever it is shared."""
    for name, owner in cast(LM, model).owners.items():
        if prefix + owner in state:
            state[prefix + name] = state[prefix + owner]
