"""The engine: one model on one mesh. Builds, shards, initialises, and turns a batch into gradients that are complete.

The order of application is the body of `Engine.__init__`; nothing else touches a model's placement.
Shape suffixes: N this data rank's sequences of a step, T sequence.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from models.buffers import reset_buffers
from models.config import LMConfig
from models.lm import LM, Output
from models.loss import IGNORE
from models.memory.base import MemoryConfig
from models.memory.none import NoneConfig
from parallel import context, data, expert, gradients, pipeline, tensor, whole_stream
from parallel.compiled import compile_layers, refuse_schedule
from parallel.holdings import Holdings
from parallel.mesh import Mesh
from parallel.precision import ComputeCopies, master
from parallel.preflight import refuse, refuse_memory
from parallel.ranks import Ranks
from parallel.shards import cut_parameters, fill


@dataclasses.dataclass
class Batch:
    """One data rank's sequences of a step, micro-batch-major: int64 [N, T]. targets: -100 is none. keys: [N], one for
    the random draws of each sequence (`models.noise`)."""

    tokens: Tensor
    targets: Tensor
    documents: Tensor | None = None
    positions: Tensor | None = None
    keys: Tensor | None = None

    def side(self) -> dict[str, Tensor]:
        return {f.name: value for f in dataclasses.fields(self) if (value := getattr(self, f.name)) is not None}


@dataclasses.dataclass
class StepOutput:
    """Equal on all ranks.

    loss: mean cross-entropy over the step's valid targets. losses: other losses, likewise divided by the token count.
    stats: sums over the step. votes: how many ranks voted yes.
    """

    loss: Tensor
    tokens: int
    losses: dict[str, Tensor]
    stats: dict[str, Tensor]
    votes: int = 0


def pad(batch: Batch, multiple: int) -> Batch:
    """Fill up the sequence to a multiple with tokens that are no one's document and have no target."""
    short = -batch.tokens.shape[1] % multiple
    if not short:
        return batch
    documents = batch.documents if batch.documents is not None else torch.zeros_like(batch.tokens)
    positions = batch.positions
    if positions is None:
        positions = torch.arange(batch.tokens.shape[1], device=batch.tokens.device).expand_as(batch.tokens)
    return Batch(
        F.pad(batch.tokens, (0, short)),
        F.pad(batch.targets, (0, short), value=IGNORE),
        F.pad(documents, (0, short), value=-1),
        F.pad(positions, (0, short)),
        batch.keys,
    )


class Engine(Holdings):
    """dtype: of the computation; weights and gradients are kept in float32, or in float64 if it is that.
    compile: the layers, with torch.compile. memory: what of their forward pass is kept, all by default. sequence: about
    how many tokens one has, by which the cost of a pipeline's layers is weighed.

    Raises ValueError, before anything is allocated, for a model that the mesh cannot hold.
    """

    def __init__(
        self,
        config: LMConfig,
        mesh: Mesh,
        *,
        seed: int,
        dtype: torch.dtype = torch.float32,
        compile: bool = False,
        memory: MemoryConfig | None = None,
        sequence: int = 1,
    ) -> None:
        self.config, self.mesh, self.dtype = config, mesh, dtype
        memory = memory or NoneConfig()
        refuse(config, mesh.config, memory, compile)
        refuse_memory(config, mesh.config, memory, compile)
        if compile:
            refuse_schedule(mesh.config)
        with torch.device("meta"):
            whole_model = LM(config)
            self.stages = pipeline.stages(config, mesh, sequence) if mesh.pp.size > 1 else []
        self.models: list[LM] = [stage.model for stage in self.stages] or [whole_model]
        heads = tensor.over_heads(whole_model)
        for index, model in enumerate(self.models):
            model.to(master(dtype))
            cut_parameters(model, mesh)
            tensor.parallelize(model, mesh, heads)
            if mesh.config.overlap:
                whole_stream.parallelize(model, mesh.tp, heads)
            context.parallelize(model, mesh)
            expert.parallelize(model, mesh)
            data.parallelize(self.stages[index] if self.stages else model, model, mesh, dtype)
            model.to_empty(device=mesh.device)
            fill(model, mesh, seed)
            reset_buffers(model)
            memory.apply(model)
            for layer in model.blocks:
                layer.keeper.apart = data.holds_units(layer)
                layer.keeper.across = max(mesh.config.tp, mesh.config.cp, mesh.config.expert_ranks) > 1
            if compile:
                compile_layers(model)
        self.copies = [ComputeCopies(model, dtype, mesh.config.splits_backward) for model in self.models]
        self.shared = self._shared()
        self._schedules: dict[tuple[int, ...], object] = {}

    def _shared(self) -> dict[str, Ranks]:
        """Parameters with copies on several stages, whatever made them, and the pipeline ranks that hold one."""
        if not self.stages:
            return {}
        everyone: list[list[str]] = [[] for _ in range(self.mesh.pp.size)]
        dist.all_gather_object(everyone, [held.shard.name for held in self.held()], group=self.mesh.pp.group)
        holders: dict[str, list[int]] = {}
        for rank, names in enumerate(everyone):
            for name in names:
                holders.setdefault(name, []).append(rank)
        copied = {name: tuple(sorted(set(ranks))) for name, ranks in sorted(holders.items()) if len(ranks) > 1}
        groups = {ranks: self.mesh.pipeline_ranks(ranks) for ranks in dict.fromkeys(copied.values())}
        return {name: groups[ranks] for name, ranks in copied.items()}

    def step_gradients(self, batch: Batch, micro_batches: int, vote: Callable[[], bool] = lambda: False) -> StepOutput:
        """Zero the gradients, run forward and backward over this data rank's batch, and complete them.

        vote: asked once all of that is done, and counted over the ranks on the way of the loss.
        Raises ValueError when the sequences do not divide into micro-batches, or the schedule needs more of them.
        """
        sequences = batch.tokens.shape[0]
        if sequences % micro_batches:
            raise ValueError(f"{sequences} sequences per data rank do not divide into {micro_batches} micro-batches")
        if self.stages:
            pipeline.refuse(self.mesh.config, len(self.config.expanded), micro_batches)
        self.clear_gradients()
        batch = pad(batch, self.mesh.config.sequence_multiple)
        tokens = int(self._sum_over_data((batch.targets != IGNORE).sum()))
        scale = 1.0 / max(tokens, 1)
        run = self._pipelined if self.stages else self._local
        with self._computing():
            record = run(batch, micro_batches, scale)
        self.complete_gradients()
        return self._output(record, tokens, vote)

    def clear_gradients(self) -> None:
        """Forget those of the step before, whether or not they were used."""
        for held in self.held():
            held.parameter.grad = None

    def complete_gradients(self) -> None:
        """Sum what the ranks' micro-batches added up."""
        gradients.reduce(self.held(), self.mesh, self.shared)

    @contextlib.contextmanager
    def _computing(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for copies in self.copies:
                stack.enter_context(copies.active())
            yield

    def _sum_over_data(self, x: Tensor) -> Tensor:
        """Over data ranks only: tensor, context and pipeline ranks hold the same sequences."""
        if self.mesh.data_size == 1:
            return x
        x = x.clone()
        if self.mesh.sequence.index:
            x.zero_()
        return self.mesh.stage.sum_(x)

    def forward(self, side: dict[str, Tensor]) -> Output:
        """One micro-batch of training without a pipeline."""
        return pipeline.forward(self.models[0], side)

    def _local(self, batch: Batch, micro_batches: int, scale: float) -> pipeline.Record:
        record = pipeline.Record()
        chunks = {name: x.chunk(micro_batches) for name, x in batch.side().items()}
        for index in range(micro_batches):
            side = {name: parts[index] for name, parts in chunks.items()}
            record.add(self.both_passes(side, scale, last=index == micro_batches - 1))
        return record

    def both_passes(self, side: dict[str, Tensor], scale: float, last: bool) -> Output:
        """Forward and backward of one micro-batch without a pipeline. scale: of the loss. last: of the step."""
        model = self.models[0]
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(last)
        out = self.forward(side)
        assert out.loss is not None
        (out.loss * scale).backward()
        return out

    def _pipelined(self, batch: Batch, micro_batches: int, scale: float) -> pipeline.Record:
        sequences, length = batch.tokens.shape
        key = (micro_batches, sequences // micro_batches, length)
        if key not in self._schedules:
            self._schedules[key] = pipeline.build_schedule(self.stages, self.mesh, *key, self.dtype)
        record = pipeline.Record()
        for stage in self.stages:
            stage.scale, stage.record = scale, record
            stage.shelf.clear()
        last = any(not stage.plan.sent for stage in self.stages)
        self._schedules[key].step(**batch.side(), target=batch.targets if last else None)  # type: ignore[attr-defined]
        return record

    @torch.no_grad()
    def _output(self, record: pipeline.Record, tokens: int, vote: Callable[[], bool]) -> StepOutput:
        """Sum what the ranks recorded: tokens are spread over data, context and tensor ranks, layers over stages."""
        loss = torch.zeros((), dtype=torch.float64, device=self.mesh.device)
        for value in record.token_loss:
            loss = loss + value
        losses = self._sum_named(record.losses)
        stats = self._sum_named(record.stats)
        sums = torch.stack([loss, loss.new_tensor(float(vote()))])
        if dist.is_initialized():
            dist.all_reduce(sums)
        loss, votes = sums[0] / max(tokens, 1), int(sums[1])
        return StepOutput(loss, tokens, {k: v / max(tokens, 1) for k, v in losses.items()}, stats, votes)

    def _sum_named(self, records: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Sum over micro-batches, the ranks of the stage, and the stages that have the name."""
        sums: dict[str, Tensor] = {}
        for record in records:
            for name, value in record.items():
                sums[name] = sums[name] + value if name in sums else value
        about = {name: (value.shape, value.dtype) for name, value in sums.items()}
        everyone = [about]
        if self.mesh.pp.size > 1:
            everyone = [{} for _ in range(self.mesh.pp.size)]
            dist.all_gather_object(everyone, about, group=self.mesh.pp.group)
        every = {name: like for theirs in everyone for name, like in theirs.items()}
        if not dist.is_initialized() or not every:
            return sums
        # One sum over all ranks, with zeros for what other stages have; float64 holds every type's values.
        zeros = {name: torch.zeros(shape, device=self.mesh.device) for name, (shape, _) in every.items()}
        flat = torch.cat([sums.get(name, zeros[name]).double().flatten() for name in every])
        dist.all_reduce(flat)
        parts = flat.split([shape.numel() for shape, _ in every.values()])
        return {
            name: part.view(shape).to(dtype) for part, (name, (shape, dtype)) in zip(parts, every.items(), strict=True)
        }

    def grad_norm(self) -> Tensor:
        return gradients.norm(self.held(), self.mesh)

    def clip(self, max_norm: float, norm: Tensor) -> None:
        gradients.clip(self.held(), max_norm, norm)

    def after_step(self, stats: dict[str, Tensor]) -> None:
        for model in self.models:
            model.after_step(stats)

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> tuple[float, int]:
        """(cross-entropy sum, valid targets) of the batches of all data ranks; equal on all ranks. Nothing is drawn."""
        batch = pad(dataclasses.replace(batch, keys=None), self.mesh.config.sequence_multiple)
        with self._computing():
            if self.stages:
                record = pipeline.relay(self.stages, self.mesh, batch.side())
            else:
                record = pipeline.Record()
                record.add(pipeline.forward(self.models[0], batch.side()))
        for root in self.stages or self.models:
            data.reshard(root)
        sums = torch.zeros(2, dtype=torch.float64, device=self.mesh.device)
        for loss, count in zip(record.token_loss, record.count, strict=True):
            sums += torch.stack([loss.double(), count.double()])
        if dist.is_initialized():
            dist.all_reduce(sums)
        return float(sums[0]), int(sums[1])
