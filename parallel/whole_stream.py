"""Tensor parallelism whose sums are under way while the next branch computes, for residuals that leave them the time.

Every tensor rank holds the stream of all tokens. A branch gathers nothing on entry; its partial sum is launched on
exit, and waited for where the residual lands it: one branch later (arXiv 2501.06589). Outside branches all tensor ranks
compute the same. Each goes on with it in its own branches and, at the end, with its own tokens' loss, so that its
gradient of the stream is one part of a sum, as everywhere (see `parallel.gradients`): the backward pass sums it on its
way into a branch, while the branch before goes backward.
Shape suffixes: B batch, T sequence, D model width, V vocabulary.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from models.boundary import Boundary, Ends
from models.lm import LM
from models.state import Side, State, Views
from parallel.collectives import all_gather_rows, reduce_scatter_rows, sum_all
from parallel.in_flight import Flight, Started
from parallel.ranks import Ranks
from parallel.tensor import TensorBoundary, VocabCrossEntropy, VocabLookup

Finish = Callable[[Tensor], Tensor]


class Arrivals:
    """What is under way, by the memory of what was sent: on its way through the model a tensor is seen in new views."""

    def __init__(self) -> None:
        self._flights: dict[int, tuple[Flight, Finish]] = {}

    def launch(self, flight: Flight, finish: Finish) -> Tensor:
        """finish: done to what arrives."""
        carrier = flight.carrier
        assert carrier is not None, "it has landed"
        self._flights[place(carrier)] = flight, finish
        return carrier

    def land(self, x: Tensor) -> Tensor:
        """What has arrived for x; x itself if nothing is under way."""
        if place(x) not in self._flights:
            return x
        flight, finish = self._flights.pop(place(x))
        return finish(flight.wait(x))


def place(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


class WholeBoundary(TensorBoundary):
    """A branch that computes a part of every token's output: all tokens are there, and the sum of the parts is under
    way when it is left."""

    def __init__(self, tp: Ranks, over_heads: frozenset[str], arrivals: Arrivals) -> None:
        super().__init__(tp, over_heads)
        self.arrivals = arrivals

    def enter(self, views: Views, inputs: State, by_head: State) -> tuple[Views, State]:
        return views, inputs

    def exit(self, out_BTD: Tensor) -> Tensor:
        return self.arrivals.launch(Flight(out_BTD, self._sum, self._sum), lambda sum_BTD: sum_BTD)

    def side(self, side: Side) -> Side:
        return side

    def _sum(self, x: Tensor) -> Started:
        # A gradient may be another tensor's too, and what a branch returns may be kept for its backward pass.
        out = x.clone(memory_format=torch.contiguous_format)
        return out, dist.all_reduce(out, group=self.tp.group, async_op=True)


class OwnTokensBoundary(Boundary):
    """A branch that computes some tokens' whole output: each rank takes its own, and the others' are under way when it
    is left."""

    def __init__(self, tp: Ranks, arrivals: Arrivals) -> None:
        self.tp, self.arrivals = tp, arrivals

    def enter(self, views: Views, inputs: State, by_head: State) -> tuple[Views, State]:
        return views.map(lambda x_BTD: own_tokens(x_BTD, self.tp)), inputs

    def exit(self, out_BTD: Tensor) -> Tensor:
        flight = Flight(out_BTD, self._gather, self._scatter)
        return self.arrivals.launch(flight, lambda parts_RBTD: parts_RBTD.transpose(0, 1).flatten(1, 2))

    def side(self, side: Side) -> Side:
        return own_side(side, self.tp)

    def _gather(self, x_BTD: Tensor) -> Started:
        parts_RBTD = x_BTD.new_empty((self.tp.size, *x_BTD.shape))
        return parts_RBTD, all_gather_rows(parts_RBTD.flatten(0, 1), x_BTD.contiguous(), self.tp, async_op=True)

    def _scatter(self, grad_RBTD: Tensor) -> Started:
        out = torch.empty_like(grad_RBTD[0], memory_format=torch.contiguous_format)
        return out, reduce_scatter_rows(out, grad_RBTD.contiguous().flatten(0, 1), self.tp, async_op=True)


class WholeEnds(Ends):
    """In front of the head each rank goes on with its own tokens; what leaves a stage has arrived."""

    def __init__(self, tp: Ranks, arrivals: Arrivals) -> None:
        self.tp, self.arrivals = tp, arrivals

    def close(self, state: State, side: Side) -> tuple[State, Side]:
        return {name: own_tokens(x, self.tp) for name, x in self.leave(state).items()}, own_side(side, self.tp)

    def leave(self, state: State) -> State:
        return {name: self.arrivals.land(x) for name, x in state.items()}


class WholeLookup(VocabLookup):
    """Each rank looks up its rows of the vocabulary for all tokens."""

    def __call__(self, weight_VD: Tensor, tokens_BT: Tensor) -> Tensor:
        return sum_all(self.own(weight_VD, tokens_BT), self.tp)


def own_tokens(x_BT: Tensor, tp: Ranks) -> Tensor:
    return x_BT.chunk(tp.size, 1)[tp.index]


def own_side(side: Side, tp: Ranks) -> Side:
    length = side.tokens_BT.shape[1] // tp.size
    return side.narrow(tp.index * length, length)


def parallelize(model: LM, tp: Ranks, heads: frozenset[str]) -> None:
    """Set every branch's boundary, where its output lands, and the model's ends. heads: see
    `parallel.tensor.over_heads`."""
    arrivals = Arrivals()
    model.ends = WholeEnds(tp, arrivals)
    for layer in model.blocks:
        for sublayer in (layer.mixer, layer.ffn):
            sublayer.connection.land = arrivals.land
            gathered = sublayer.branch.entry == "gathered"
            sublayer.boundary = WholeBoundary(tp, heads, arrivals) if gathered else OwnTokensBoundary(tp, arrivals)
    if model.embed is not None:
        model.embed.lookup = WholeLookup(tp)
    if model.head is not None:
        model.head.cross_entropy = VocabCrossEntropy(tp)
