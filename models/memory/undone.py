"""Layers that are undone: one autograd.Function each, whose backward pass computes the layer's input from its output.

Lies inside the layer's FSDP unit. The backward pass takes the layer's output from the layer behind, runs its branches
again for their outputs, subtracts those, and hands the input on to the layer before. The branches' graphs of that one
run give all gradients, which are returned and not accumulated on the side, so that reductions, `torch.autograd.grad`
and accumulation see an ordinary node. Only where a part of the layer is an FSDP unit of its own, whose parameters are
there while it runs and no longer, the parameters' gradients arrive as in any backward pass.
"""

import dataclasses
import weakref
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from models.choices import Choices, Chosen
from models.keeper import Keeper
from models.params import upcast
from models.state import Choose, Side, State

if TYPE_CHECKING:
    from models.layer import Extras, Layer

DRIFT = "memory.drift"


class Chain:
    """Layers that follow one another on a stage, and the state that the last backward pass among them rebuilt.

    steps: what of a layer is undone at once, in order. exact: what is rebuilt is what was there. passes: forward passes
    so far. A micro-batch goes forward through all layers, and backward through all layers, before another one does.
    """

    def __init__(self, steps: tuple[tuple[str, ...], ...], exact: bool) -> None:
        self.steps, self.exact, self.passes = steps, exact, 0
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
    """index: of the layer in its chain, of which it may be the last."""

    def __init__(self, chain: Chain, index: int, last: bool) -> None:
        self.chain, self.index, self.last = chain, index, last

    def run(self, layer: "Layer", state: State, side: Side, local: Side) -> "tuple[State, Extras]":
        if not self.index:
            self.chain.passes += 1
        call = Call(self, layer, state, side, local)
        self.called(call)
        made = _Undone.apply(call, *(state[name] for name in call.taken), *call.parameters)
        written = dict(zip(call.written, made, strict=False))
        losses = dict(zip(call.losses, made[len(written) :], strict=True))
        # The node keeps the call, which must not keep the losses, which keep their node.
        extras, call.extras = call.extras, None
        assert extras is not None
        stats = extras.stats if call.drift is None else {**extras.stats, DRIFT: call.drift}
        return {**state, **written}, extras._replace(losses=losses, stats=stats)

    def called(self, call: "Call") -> None:
        """In each forward pass."""

    def backward(self, call: "Call", gradients: tuple[Tensor | None, ...]) -> "Gradients":
        """Of the call's entries and parameters, from those of what it wrote and of its losses."""
        found = Gradients(call, gradients)
        after = call.behind if self.last else self.chain.take(call.number, self.index)
        for step in reversed(self.chain.steps):
            again, after = call.undo(step, after)
            found.add(again)
        if self.index:
            self.chain.put(call.number, self.index - 1, after)
        self.measure(call, after)
        return found

    def measure(self, call: "Call", before: State) -> None:
        """before: the rebuilt state in front of the layer."""
        if call.drift is not None:
            call.drift.copy_(difference(call.inputs, before))


class Again(NamedTuple):
    """A step that ran again: what it was given, what it wrote, and its losses."""

    leaves: State
    outputs: State
    losses: list[tuple[str, Tensor]]


class Call:
    """One forward pass of a layer. taken: the entries that it takes, of which `streams` are computed back. written:
    what it hands on. sides: the taken entries that are kept; inputs, behind: streams that are, where there is need.
    drift: what `difference` says, once the backward pass is there; None where arithmetic makes it 0. before: the call
    of the layer in front, where its turn is prepared.
    """

    def __init__(self, keeper: Undone, layer: "Layer", state: State, side: Side, local: Side) -> None:
        self.keeper, self.layer, self._side, self._local = keeper, layer, side, local
        self.number = keeper.chain.passes
        connections = layer.mixer.connection, layer.ffn.connection
        own = {name for connection in connections for name in connection.reads}
        read = {name for names, _ in layer.events() for name in names}
        self.streams = tuple(name for name in state if name in own)
        self.taken = tuple(name for name in state if name in own | read)
        self.written: tuple[str, ...] = ()
        self.losses: tuple[str, ...] = ()
        self.extras: Extras | None = None
        self.parameters = visible(layer)
        self.choices = Choices()
        self.before: weakref.ref[Call] | None = None
        self.sides: State = {}
        self.inputs: State = {}
        self.behind: State = {}
        # On a grid too where ranks add up: nothing but the collectives' repeating themselves makes the sums equal ones.
        measured = not keeper.index and (keeper.across or not keeper.chain.exact)
        self.drift = upcast(state[self.streams[0]].new_zeros(2)) if measured else None

    def forward(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """What is written, then losses."""
        given = dict(zip(self.taken, tensors, strict=False))
        state, self.extras = self.layer.run(given, *self.both(self.choices))
        # Streams that the layer only reads are handed on too, so that all gradients of a stream are added one by one
        # from the last to the first, as without undoing, and not those of this layer by themselves.
        made = {name: x for name, x in state.items() if name in self.streams or x is not given.get(name)}
        kept = {name: x for name, x in made.items() if name in self.layer.keep}
        self.written, self.losses = tuple(kept), tuple(self.extras.losses)
        # Detached, since an output that its own node refers to would never be freed.
        self.sides = {name: x.detach() for name, x in given.items() if name not in self.streams}
        if self.drift is not None:
            self.inputs = {name: given[name].detach() for name in self.streams}
        if self.keeper.last:
            self.behind = {name: state[name].detach() for name in self.streams}
        return *kept.values(), *self.extras.losses.values()

    def both(self, choices: Choose) -> tuple[Side, Side]:
        """side, local: as the layer is given them."""
        return dataclasses.replace(self._side, choices=choices), dataclasses.replace(self._local, choices=choices)

    def undo(self, step: tuple[str, ...], after: State) -> tuple[Again, State]:
        """The step's second run, and the streams in front of it, from those behind it."""
        connection = getattr(self.layer, step[-1]).connection
        side, local = self.both(Chosen(self.choices))
        with torch.enable_grad():
            given = {**self.sides, **connection.unwritten(after)}
            leaves = {name: x.detach().requires_grad_(x.is_floating_point()) for name, x in given.items()}
            state, gates = leaves, self.layer.gated(leaves, local)[1]
            state, results = self.layer.run_branches(step, state, side, local, gates)
            losses = [loss for result in results for loss in result.losses.items()]
        entries = {entry.name for role in step for entry in getattr(self.layer, role).writes}
        before = connection.undo(after, {name: x.detach() for name, x in state.items()})
        return Again(leaves, {name: state[name] for name in state if name in entries}, losses), before


class _Undone(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: Call, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.call = call
        ctx.set_materialize_grads(False)
        return call.forward(tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        call: Call = ctx.call
        found = call.keeper.backward(call, gradients)
        return None, *(found.of_entries.get(name) for name in call.taken), *found.of_parameters


class Gradients:
    """On the way back through a layer, a step at a time: those of the state's entries, and of the parameters."""

    def __init__(self, call: Call, gradients: tuple[Tensor | None, ...]) -> None:
        self.call = call
        entries = len(call.written)
        self.of_entries = dict(zip(call.written, gradients[:entries], strict=True))
        self.of_losses = dict(zip(call.losses, gradients[entries:], strict=True))
        self.of_parameters: list[Tensor | None] = [None] * len(call.parameters)

    def add(self, again: Again) -> None:
        """Take the gradients of what the step was given to those that are there."""
        outputs = [(x, self.of_losses[name]) for name, x in again.losses]
        outputs += [(x, self.of_entries.pop(name)) for name, x in again.outputs.items() if name in self.of_entries]
        outputs = [(x, gradient) for x, gradient in outputs if gradient is not None and x.requires_grad]
        if not outputs:
            return
        leaves = [(name, x) for name, x in again.leaves.items() if x.requires_grad]
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


def difference(was: State, rebuilt: State) -> Tensor:
    """[2]: the squares of what differs, and of what was there, summed."""
    pairs = [(upcast(x), upcast(rebuilt[name])) for name, x in was.items()]
    return torch.stack([torch.stack([(x - y).square().sum(), x.square().sum()]) for x, y in pairs]).sum(0)


def visible(module: nn.Module) -> tuple[Tensor, ...]:
    """What a module's parts see as their parameters (copies in the computation's type, where there are such), once."""
    found = {
        id(tensor): tensor
        for part in module.modules()
        for name, _ in part.named_parameters(recurse=False)
        for tensor in (getattr(part, name),)
    }
    return tuple(found.values())
