"""Pipelined backpropagation: a stage updates its weights after every micro-batch, and no stage waits for another.

In each cycle stage s of p goes forward with one micro-batch and backward with an earlier one, whose gradient is by then
D = 2 (p - 1 - s) updates late (Kosson et al., arXiv 2003.11666, section 2). The pipeline drains at the end of a step,
so that the first micro-batches' gradients are less late. Weights change between a micro-batch's passes: the backward
pass has the newer ones.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.mesh import Mesh
from parallel.pipeline import Stage, example

# Tensors by the stage that they go to or come from; `expected` ones are meta tensors of their shapes and types.
Parcels = dict[int, list[Tensor]]


class Wire(Protocol):
    """Between the stages. What they send each other travels between two cycles, all at once."""

    def post(self, sent: Parcels, expected: Parcels) -> None:
        """At the end of a cycle. Nobody waits."""
        ...

    def arrived(self) -> Parcels:
        """What was expected at the end of the cycle before."""
        ...


class Updates(Protocol):
    """What is done to a stage's weights on the way. delay: updates between a micro-batch's forward pass and its own."""

    def ahead(self, delay: int) -> AbstractContextManager[None]:
        """Around a forward pass."""
        ...

    def arrived(self, delay: int) -> None:
        """A micro-batch's gradient is there, as the parameters' `.grad`, divided by the tokens of the whole step."""
        ...


class RankWire:
    """Between the ranks of a pipeline that have one stage each.

    In one batch: NCCL runs what two ranks send each other one by one in the order of their calls, in which each would
    wait for the other to receive.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._works: list[dist.Work] = []
        self._sent, self._expected = Parcels(), Parcels()

    def post(self, sent: Parcels, expected: Parcels) -> None:
        group = self._mesh.pp.group
        self._sent = {stage: [x.contiguous() for x in tensors] for stage, tensors in sent.items()}
        self._expected = {
            stage: [torch.empty_like(x, device=self._mesh.device) for x in likes] for stage, likes in expected.items()
        }
        pairs = ((dist.isend, self._sent), (dist.irecv, self._expected))
        ops = [
            dist.P2POp(what, x, group=group, group_peer=stage)
            for what, parcels in pairs
            for stage, tensors in parcels.items()
            for x in tensors
        ]
        self._works = dist.batch_isend_irecv(ops) if ops else []

    def arrived(self) -> Parcels:
        for work in self._works:
            work.wait()
        found, self._works, self._sent, self._expected = self._expected, [], {}, {}
        return found


def latest(stage: Stage, stages: int) -> int:
    """By how many updates a stage's gradients are late, at most."""
    return 2 * (stages - 1 - stage.plan.index)


def cycles(stage: Stage, mesh: Mesh, wire: Wire, updates: Updates, sides: list[dict[str, Tensor]]) -> Iterator[None]:
    """Run one stage through a step. sides: of its micro-batches. Each cycle ends with a yield."""
    index, last, count = stage.plan.index, mesh.config.num_stages - 1, len(sides)
    batch, length = sides[0]["tokens"].shape
    dtype = next(stage.model.parameters()).dtype
    before, behind = (list(example(e, batch, length, mesh, dtype)) for e in (stage.plan.received, stage.plan.sent))
    waiting: dict[int, tuple[list[Tensor], tuple[Tensor, ...]]] = {}
    for cycle in range(count + 2 * last):
        ahead, back = cycle - index, cycle - 2 * last + index
        arrived, sent = wire.arrived(), Parcels()
        if 0 <= ahead < count:
            received = [x.requires_grad_() for x in arrived[index - 1]] if index else []
            with updates.ahead(min(ahead, latest(stage, last + 1))):
                out = stage(*received, **sides[ahead])
            outs = out if isinstance(out, tuple) else (out,)
            waiting[ahead] = received, outs
            if index < last:
                sent[index + 1] = [x.detach() for x in outs]
        if 0 <= back < count:
            received, outs = waiting.pop(back)
            grads = arrived[index + 1] if index < last else [torch.ones_like(outs[0])]
            with_grad = [(x, grad) for x, grad in zip(outs, grads, strict=True) if x.requires_grad]
            torch.autograd.backward([x for x, _ in with_grad], [grad for _, grad in with_grad])
            if index:
                sent[index - 1] = [torch.zeros_like(x) if x.grad is None else x.grad for x in received]
            updates.arrived(min(back, latest(stage, last + 1)))
        expected = Parcels()
        if index and 0 <= ahead + 1 < count:
            expected[index - 1] = before
        if index < last and 0 <= back + 1 < count:
            expected[index + 1] = behind
        wire.post(sent, expected)
        yield
