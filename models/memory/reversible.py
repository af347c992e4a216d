"""Nothing of a layer is kept: its input is computed back from its output, through residuals that can be undone.

One autograd.Function per layer, inside its FSDP unit. Its backward pass takes the layer's output from the layer behind,
runs its branches again for their outputs, subtracts those, and hands the input on to the layer before. The branches'
graphs of that one run give all gradients, which are returned and not accumulated on the side, so that reductions,
`torch.autograd.grad` and accumulation see an ordinary node. Only where a part of the layer is an FSDP unit of its own,
whose parameters are there while it runs and no longer, the parameters' gradients arrive as in any backward pass.
"""

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from models.config import LMConfig
from models.keeper import Keeper
from models.memory.base import MemoryConfig
from models.state import Side, State

if TYPE_CHECKING:
    from models.layer import Extras, Layer
    from models.lm import LM


@dataclasses.dataclass(frozen=True)
class ReversibleConfig(MemoryConfig, kind="reversible"):
    """Layers are undone (RevNet, arXiv 1707.04585): memory does not grow with depth, for one more forward pass. Takes a
    residual that can be undone; on its grid the states are rebuilt bit for bit."""

    splits_backward = False
    uncompiled = "which may round otherwise when they are run again with gradients"

    def refuse(self, model: "LM") -> None:
        residual = model.config.residual
        if not residual.steps:
            fits = type(residual).such_as(lambda kind: bool(kind.steps))
            raise ValueError(
                f"memory reversible undoes layers, and residual {residual.kind} cannot be undone; use one that "
                f"can{fits}, or memory full"
            )
        for layer in model.blocks:
            depth = layer.depth
            if depth.peeks or depth.reads or depth.writes or depth.has_losses:
                raise ValueError(
                    f"memory reversible undoes layers from their outputs, and depth {model.config.depth.kind} looks at "
                    "their inputs; use depth full, or memory full"
                )
            earlier: set[str] = set()
            for step in residual.steps:
                parts = [getattr(layer, role) for role in step]
                if crossing := earlier & {name for part in parts for name in part.branch.reads}:
                    raise ValueError(
                        f"memory reversible undoes a layer's branches in turn, and one of layer {layer.index} reads "
                        f"{sorted(crossing)[0]!r}, which another writes in the same layer; use memory full"
                    )
                earlier |= {entry.name for part in parts for entry in part.branch.writes}

    def keepers(self, layers: "list[Layer]", config: LMConfig) -> list[Keeper]:
        chain = Chain(config.residual.steps)
        return [Undone(chain, index, last=layer is layers[-1]) for index, layer in enumerate(layers)]


class Chain:
    """Layers that follow one another on a stage, and the state that the last backward pass among them rebuilt.

    steps: what of a layer is undone at once, in order. passes: forward passes so far. A micro-batch goes forward
    through all layers, and backward through all layers, before another one does.
    """

    def __init__(self, steps: tuple[tuple[str, ...], ...]) -> None:
        self.steps, self.passes = steps, 0
        self._rebuilt: tuple[int, int, State] | None = None

    def put(self, number: int, index: int, state: State) -> None:
        """The state behind layer `index` in forward pass `number`."""
        self._rebuilt = (number, index, state)

    def take(self, number: int, index: int) -> State:
        assert self._rebuilt is not None and self._rebuilt[:2] == (number, index), (
            f"the backward pass of layer {index} follows that of the layer behind it"
        )
        state, self._rebuilt = self._rebuilt[2], None
        return state


class Undone(Keeper):
    def __init__(self, chain: Chain, index: int, last: bool) -> None:
        self.chain, self.index, self.last = chain, index, last

    def run(self, layer: "Layer", state: State, side: Side, local: Side) -> "tuple[State, Extras]":
        if not self.index:
            self.chain.passes += 1
        call = Call(self, layer, state, side, local)
        made = _Undone.apply(call, *(state[name] for name in call.taken), *call.parameters)
        written = dict(zip(call.written, made, strict=False))
        losses = dict(zip(call.losses, made[len(written) :], strict=True))
        assert call.extras is not None
        return {**state, **written}, call.extras._replace(losses=losses)


class Call:
    """One forward pass of a layer. taken: the entries that it takes, of which `streams` are computed back. written:
    what it hands on."""

    def __init__(self, keeper: Undone, layer: "Layer", state: State, side: Side, local: Side) -> None:
        self.keeper, self.layer, self.side, self.local = keeper, layer, side, local
        self.number = keeper.chain.passes
        connections = layer.mixer.connection, layer.ffn.connection
        own = {entry.name for connection in connections for entry in connection.writes}
        read = {name for names, _ in layer.events() for name in names}
        self.streams = tuple(name for name in state if name in own)
        self.taken = tuple(name for name in state if name in own | read)
        self.written: tuple[str, ...] = ()
        self.losses: tuple[str, ...] = ()
        self.extras: Extras | None = None
        self.parameters = visible(layer)

    def forward(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """What is written, then losses."""
        given = dict(zip(self.taken, tensors, strict=False))
        state, self.extras = self.layer.run(given, self.side, self.local)
        kept = {name: x for name, x in state.items() if name in self.layer.keep and x is not given.get(name)}
        self.written, self.losses = tuple(kept), tuple(self.extras.losses)
        return *kept.values(), *self.extras.losses.values()


class _Undone(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: Call, *tensors: Tensor) -> tuple[Tensor, ...]:
        made = call.forward(tensors)
        ctx.call = call
        ctx.set_materialize_grads(False)
        sides = [x for name, x in zip(call.taken, tensors, strict=False) if name not in call.streams]
        state = dict(zip(call.written, made, strict=False))
        behind = [state[name] for name in call.streams] if call.keeper.last else []
        ctx.save_for_backward(*sides, *behind)
        return made

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        call: Call = ctx.call
        keeper, saved = call.keeper, ctx.saved_tensors
        names = [name for name in call.taken if name not in call.streams]
        sides, behind = dict(zip(names, saved, strict=False)), saved[len(names) :]
        if keeper.last:
            after = dict(zip(call.streams, behind, strict=True))
        else:
            after = keeper.chain.take(call.number, keeper.index)
        walk = Walk(call, sides, gradients)
        for step in reversed(keeper.chain.steps):
            after = walk.undo(step, after)
        if keeper.index:
            keeper.chain.put(call.number, keeper.index - 1, after)
        return None, *(walk.of_entries.get(name) for name in call.taken), *walk.of_parameters


class Walk:
    """The way back through a layer, a step at a time: the gradients of the state's entries, and of the parameters."""

    def __init__(self, call: Call, sides: State, gradients: tuple[Tensor | None, ...]) -> None:
        self.call, self.sides = call, sides
        entries = len(call.written)
        self.of_entries = dict(zip(call.written, gradients[:entries], strict=True))
        self.of_losses = dict(zip(call.losses, gradients[entries:], strict=True))
        self.of_parameters: list[Tensor | None] = [None] * len(call.parameters)

    def undo(self, step: tuple[str, ...], after: State) -> State:
        """The streams in front of the step, from those behind it."""
        layer, connection = self.call.layer, getattr(self.call.layer, step[-1]).connection
        with torch.enable_grad():
            given = {**self.sides, **connection.unwritten(after)}
            leaves = {name: x.detach().requires_grad_(x.is_floating_point()) for name, x in given.items()}
            redone, losses = self.run(step, leaves)
            outputs = [(x, self.of_losses[name]) for name, x in losses]
            for entry in (entry for role in step for entry in getattr(layer, role).writes):
                if entry.name in self.of_entries:
                    outputs.append((redone[entry.name], self.of_entries.pop(entry.name)))
            outputs = [(x, gradient) for x, gradient in outputs if gradient is not None and x.requires_grad]
            self.add([x for x in leaves.items() if x[1].requires_grad], outputs)
        return connection.undo(after, {name: x.detach() for name, x in redone.items()})

    def run(self, step: tuple[str, ...], state: State) -> tuple[State, list[tuple[str, Tensor]]]:
        """The state behind the step, and its losses."""
        call, losses = self.call, []
        gates = call.layer.gated(state, call.local)[1]
        for role in step:
            if role == "mixer":
                state, result = call.layer.run_mixer(state, call.side, call.local, gates, None)
            else:
                state, result = call.layer.run_ffn(state, call.side, call.local, gates)
            losses += result.losses.items()
        return state, losses

    def add(self, leaves: list[tuple[str, Tensor]], outputs: list[tuple[Tensor, Tensor]]) -> None:
        """Take the gradients of `leaves` and of the parameters to those that are there."""
        if not outputs:
            return
        sums, gradients = [x for x, _ in outputs], [gradient for _, gradient in outputs]
        if self.call.keeper.apart:
            torch.autograd.backward(sums, gradients)
            found: list[Tensor | None] = [x.grad for _, x in leaves]
        else:
            own = [index for index, parameter in enumerate(self.call.parameters) if parameter.requires_grad]
            inputs = [*(x for _, x in leaves), *(self.call.parameters[index] for index in own)]
            found = list(torch.autograd.grad(sums, inputs, gradients, allow_unused=True))
            for index, gradient in zip(own, found[len(leaves) :], strict=True):
                self.of_parameters[index] = sum_of(self.of_parameters[index], gradient)
        for (name, _), gradient in zip(leaves, found, strict=False):
            self.of_entries[name] = sum_of(self.of_entries.get(name), gradient)


def sum_of(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    if first is None or second is None:
        return first if second is None else second
    return first + second


def visible(module: nn.Module) -> tuple[Tensor, ...]:
    """What a module's parts see as their parameters (copies in the computation's type, where there are such), once."""
    found = {
        id(tensor): tensor
        for part in module.modules()
        for name, _ in part.named_parameters(recurse=False)
        for tensor in (getattr(part, name),)
    }
    return tuple(found.values())
