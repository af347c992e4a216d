"""How fast a config trains here: whole optimiser steps on random tokens, without data, logs or checkpoints."""

import dataclasses
import time

import torch

from models.cost import cost
from parallel.engine import Batch
from parallel.mesh import Mesh
from trainer import kernels
from trainer.config import RunConfig
from trainer.peak import numbers_peak, peak_memory, synchronize


@dataclasses.dataclass(frozen=True)
class BenchResult:
    """Of all ranks together. mfu: over `peak_flops`, what this machine's own matrix products reach in the same type.

    memory_gib: rank 0's peak. loss: of the last step.
    """

    tokens_per_s: float
    mfu: float
    peak_flops: float
    memory_gib: float
    seconds_per_step: float
    parameters: int
    flops_per_token: float
    loss: float


def bench(config: RunConfig, mesh: Mesh, steps: int, warmup: int) -> BenchResult:
    """Time `steps` steps after `warmup` of them (a collective)."""
    if steps < 1 or warmup < 0:
        raise ValueError(f"steps is {steps} and warmup {warmup}; they must be at least 1 and 0")
    peak = numbers_peak(mesh.device, getattr(torch, config.train.dtype))
    spent = cost(config.model, config.data.sequence_length)
    engine, optimizer = config.engine.build(config, mesh)
    kernels.choose(config, engine)
    generator = torch.Generator().manual_seed(mesh.data_rank)
    rows = config.train.micro_batch * config.micro_batches
    shape = (rows, config.data.sequence_length + 1)
    began, loss = time.perf_counter(), 0.0
    for step in range(warmup + steps):
        if step == warmup:
            synchronize(mesh.device)
            began = time.perf_counter()
        tokens = torch.randint(config.model.vocab_size, shape, generator=generator).to(mesh.device)
        batch = Batch(tokens[:, :-1], tokens[:, 1:], keys=torch.arange(rows, device=mesh.device))
        optimizer.begin(config.optim.lr)
        out = engine.step_gradients(batch, config.micro_batches)
        if config.optim.clip is not None:
            engine.clip(config.optim.clip, engine.grad_norm())
        optimizer.step(config.optim.lr)
        engine.after_step(out.stats)
        loss = float(out.loss)
    synchronize(mesh.device)
    seconds = (time.perf_counter() - began) / steps
    speed = config.train.global_batch * config.data.sequence_length / seconds
    return BenchResult(
        tokens_per_s=speed,
        mfu=speed * spent.flops_per_token / (peak * config.mesh.world_size),
        peak_flops=peak,
        memory_gib=peak_memory(mesh.device) / 2**30,
        seconds_per_step=seconds,
        parameters=spent.parameters,
        flops_per_token=spent.flops_per_token,
        loss=loss,
    )
