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


class Wire(Protocol):
    """First in, first out, between each pair of stages."""

    def send(self, tensors: list[Tensor], stage: int) -> None: ...

    def receive(self, like: tuple[Tensor, ...], stage: int) -> list[Tensor]:
        """like: meta tensors of the shapes and types that come."""
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
    """Between the ranks of a pipeline that have one stage each."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._under_way: list[tuple[dist.Work, Tensor]] = []

    def send(self, tensors: list[Tensor], stage: int) -> None:
        for x in tensors:
            work = dist.isend(x, group=self._mesh.pp.group, group_dst=stage)
            assert work is not None
            self._under_way.append((work, x))

    def receive(self, like: tuple[Tensor, ...], stage: int) -> list[Tensor]:
        found = [torch.empty(x.shape, dtype=x.dtype, device=self._mesh.device) for x in like]
        for x in found:
            dist.recv(x, group=self._mesh.pp.group, group_src=stage)
        return found

    def drained(self) -> None:
        """Wait for all that was sent."""
        for work, _ in self._under_way:
            work.wait()
        self._under_way.clear()


def latest(stage: Stage, stages: int) -> int:
    """By how many updates a stage's gradients are late, at most."""
    return 2 * (stages - 1 - stage.plan.index)


def cycles(stage: Stage, mesh: Mesh, wire: Wire, updates: Updates, sides: list[dict[str, Tensor]]) -> Iterator[None]:
    """Run one stage through a step. sides: of its micro-batches. Each cycle ends with a yield."""
    index, last, count = stage.plan.index, mesh.config.num_stages - 1, len(sides)
    batch, length = sides[0]["tokens"].shape
    dtype = next(stage.model.parameters()).dtype
    before, behind = (example(e, batch, length, mesh, dtype) for e in (stage.plan.received, stage.plan.sent))
    waiting: dict[int, tuple[list[Tensor], tuple[Tensor, ...]]] = {}
    for cycle in range(count + 2 * last):
        ahead, back = cycle - index, cycle - 2 * last + index
        if 0 <= ahead < count:
            received = [x.requires_grad_() for x in wire.receive(before, index - 1)] if index else []
            with updates.ahead(min(ahead, latest(stage, last + 1))):
                out = stage(*received, **sides[ahead])
            outs = out if isinstance(out, tuple) else (out,)
            waiting[ahead] = received, outs
            if index < last:
                wire.send([x.detach() for x in outs], index + 1)
        if 0 <= back < count:
            received, outs = waiting.pop(back)
            grads = wire.receive(behind, index + 1) if index < last else [torch.ones_like(outs[0])]
            with_grad = [(x, grad) for x, grad in zip(outs, grads, strict=True) if x.requires_grad]
            torch.autograd.backward([x for x, _ in with_grad], [grad for _, grad in with_grad])
            if index:
                wire.send([torch.zeros_like(x) if x.grad is None else x.grad for x in received], index - 1)
            updates.arrived(min(back, latest(stage, last + 1)))
        yield
