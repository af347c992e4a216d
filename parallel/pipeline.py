"""Pipeline stages over the state: the only place where it is flattened for the wire.

Token ids, targets, document ids and positions are keyword arguments that every stage takes from the data order.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import (
    Schedule1F1B,
    ScheduleDualPipeV,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)

from models.config import LMConfig
from models.kernels.contiguous import ContiguousGradient
from models.lm import LM, Output
from models.params import Axis
from models.pieces import split
from models.state import Entry, Layout, State
from parallel import split_backward
from parallel.mesh import ONE_STAGE, V_SHAPED, Mesh, MeshConfig
from parallel.shelf import Shelf
from parallel.stages import StagePlan, owner, plan, refuse_stages

CLASSES: Mapping[str, Any] = MappingProxyType(
    {
        "gpipe": ScheduleGPipe,
        "1f1b": Schedule1F1B,
        "interleaved": ScheduleInterleaved1F1B,
        "zero_bubble": ScheduleInterleavedZeroBubble,
        "zbv": ScheduleZBVZeroBubble,
        "dualpipev": ScheduleDualPipeV,
    }
)


def refuse(
    mesh: MeshConfig, num_layers: int, micro_batches: int, setting: Callable[[int], str] = "{} micro-batches".format
) -> None:
    """Raise ValueError where the schedule cannot run, with the nearest thing that can.

    setting: what makes so many micro-batches, in words.
    """
    refuse_stages(mesh, num_layers)
    if mesh.schedule in ("interleaved", "zero_bubble") and micro_batches % mesh.pp:
        up = -(-micro_batches // mesh.pp) * mesh.pp
        raise ValueError(
            f"schedule {mesh.schedule} takes a multiple of pp={mesh.pp} micro-batches and has {micro_batches}; "
            f"use {setting(up)}"
        )
    least = mesh.num_stages if mesh.schedule in V_SHAPED else 1
    if micro_batches < least:
        raise ValueError(
            f"schedule {mesh.schedule} needs at least {least} micro-batches and has {micro_batches}; "
            f"use {setting(least)}"
        )


@dataclasses.dataclass
class Record:
    """What the forward passes of one step leave beside the gradient: detached sums."""

    token_loss: list[Tensor] = dataclasses.field(default_factory=list)
    count: list[Tensor] = dataclasses.field(default_factory=list)
    losses: list[dict[str, Tensor]] = dataclasses.field(default_factory=list)
    stats: list[dict[str, Tensor]] = dataclasses.field(default_factory=list)

    def add(self, out: Output) -> None:
        if out.token_loss is not None and out.count is not None:
            self.token_loss.append(out.token_loss)
            self.count.append(out.count)
        self.losses.append(dict(out.losses))
        self.stats.append(dict(out.stats))


def forward(model: LM, side: dict[str, Tensor], state: State | None = None) -> Output:
    """Call a model, or a slice of one, with a batch's tensors by name."""
    return model(
        side["tokens"],
        side["targets"],
        documents_BT=side.get("documents"),
        positions_BT=side.get("positions"),
        keys_B=side.get("keys"),
        state=state,
    )


class Stage(nn.Module):
    """A slice of the model that takes and returns tensors by position, in the order of its plan's entries.

    shelf: of this rank. The last stage returns its share of the loss, times `scale` (1 / global tokens), shape (1,).
    """

    def __init__(self, model: LM, plan: StagePlan, shelf: Shelf) -> None:
        super().__init__()
        self.model, self.plan, self.shelf = model, plan, shelf
        self.scale = 1.0
        self.record = Record()

    def forward(self, *tensors: Tensor, **side: Tensor) -> Tensor | tuple[Tensor, ...]:
        plan = self.plan
        # Sending a gradient back demands that it is contiguous.
        received = [ContiguousGradient.apply(x) for x in tensors]
        state = {entry.name: x for entry, x in zip(plan.received, received, strict=True)}
        if plan.taken:
            state |= zip((entry.name for entry in plan.taken), self.shelf.take(received[0]), strict=True)
        out = forward(self.model, side, state or None)
        self.record.add(out)
        if out.state is None:
            assert out.loss is not None
            return owned((out.loss * self.scale).reshape(1))
        sent = [out.state[entry.name] for entry in plan.sent]
        if plan.kept:
            sent[0] = self.shelf.keep(sent[0], tuple(out.state[entry.name] for entry in plan.kept))
        return tuple(owned(x) for x in sent)


def owned(x: Tensor) -> Tensor:
    """A contiguous tensor with storage of its own: split-backward schedules free what they send."""
    return x.clone(memory_format=torch.contiguous_format)


def stages(config: LMConfig, mesh: Mesh, sequence: int) -> list[Stage]:
    """This rank's stages, on the meta device, whole parameters. sequence: see `parallel.stages.plan`."""
    shelf, mine = Shelf(), []
    for planned in plan(LM(config), mesh.config, sequence):
        if planned.rank == mesh.pp.index:
            model = LM(config)
            model.prune(planned.start, planned.stop)
            mine.append(Stage(model, planned, shelf))
    return mine


def local_shape(entry: Entry, batch: int, sequence: int, mesh: Mesh) -> tuple[int, ...]:
    """The shape of a state entry on this rank."""
    if entry.layout is Layout.PER_RANK:
        return entry.shape
    if entry.layout is Layout.TOKENS:
        return (batch, sequence // mesh.config.stream_ranks, *entry.shape)
    assert entry.heads is not None
    _, heads, _ = split(Axis("kv_heads", entry.heads), entry.heads, mesh.tp.index, mesh.tp.size)
    return (batch, sequence // mesh.cp.size, heads, *entry.shape[1:])


def example(entries: Sequence[Entry], batch: int, sequence: int, mesh: Mesh, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Meta tensors of a boundary, from which the wire's buffers are made."""
    shapes = [local_shape(entry, batch, sequence, mesh) for entry in entries]
    dtypes = [torch.promote_types(dtype, entry.dtype or dtype) for entry in entries]
    return tuple(
        torch.empty(s, dtype=d, device="meta", requires_grad=True) for s, d in zip(shapes, dtypes, strict=True)
    )


def build_schedule(
    mine: list[Stage], mesh: Mesh, micro_batches: int, batch: int, sequence: int, dtype: torch.dtype
) -> Any:
    """A torch schedule over this rank's stages for micro-batches of shape [batch, sequence]."""
    if mesh.config.splits_backward:
        split_backward.correct()
    wired = []
    for stage in mine:
        loss = (torch.empty(1, dtype=torch.promote_types(dtype, torch.float32), device="meta", requires_grad=True),)
        wired.append(
            PipelineStage(
                stage,
                stage.plan.index,
                mesh.config.num_stages,
                torch.device(mesh.device),
                input_args=example(stage.plan.received, batch, sequence, mesh, dtype),
                output_args=example(stage.plan.sent, batch, sequence, mesh, dtype) or loss,
                group=mesh.pp.group,
            )
        )
    single = mesh.config.schedule in ONE_STAGE
    return CLASSES[mesh.config.schedule](
        wired[0] if single else wired,
        n_microbatches=micro_batches,
        loss_fn=lambda out, _: out.sum(),
        scale_grads=False,
    )


def walk(mine: list[Stage], mesh: Mesh, run: Callable[[Stage, tuple[Tensor, ...]], tuple[Tensor, ...]]) -> None:
    """Through all stages in order, forward alone (`schedule.eval` fails on V schedules; all ranks call this together).

    run: from what a stage receives to what it sends, () behind the last. Shapes travel in front of the tensors: in
    decoding they differ from call to call.
    """
    group, carried = mesh.pp.group, ()
    for stage in mine:
        index = stage.plan.index
        source, target = owner(index - 1, mesh.config), owner(index + 1, mesh.config)
        if index and source != mesh.pp.index:
            about: list[Any] = [None]
            dist.recv_object_list(about, group=group, group_src=source)
            carried = tuple(torch.empty(shape, dtype=dtype, device=mesh.device) for shape, dtype in about[0])
            for x in carried:
                dist.recv(x, group=group, group_src=source)
        carried = run(stage, carried)
        if carried and target != mesh.pp.index:
            dist.send_object_list([[(x.shape, x.dtype) for x in carried]], group=group, group_dst=target)
            for x in carried:
                dist.send(x.contiguous(), group=group, group_dst=target)


@torch.no_grad()
def relay(mine: list[Stage], mesh: Mesh, side: dict[str, Tensor]) -> Record:
    """Evaluation. Returns what this rank's stages recorded: the loss is there on the rank of the last one."""
    record = Record()

    def run(stage: Stage, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        stage.record = record
        out = stage(*tensors, **side)
        return out if isinstance(out, tuple) else ()

    walk(mine, mesh, run)
    return record
