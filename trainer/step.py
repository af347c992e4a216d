"""One step of a run: its batch, the gradients, what the policy on bad ones says, the update, and what to report."""

import time
from collections.abc import Callable
from pathlib import Path

import torch

from models.cost import cost
from parallel.engine import Engine
from parallel.replicas import differences
from trainer.config import RunConfig
from trainer.data.rows import on_device
from trainer.data.samples import Samples
from trainer.faults import Faults
from trainer.metrics import StepMetrics, depth_used, dropped_picks, expert_loads
from trainer.peak import numbers_peak, peak_memory
from trainer.state import RunState, Updater
from trainer.whereabouts import Whereabouts


class Stepper:
    """Takes the steps of a run, all of its ranks together."""

    def __init__(
        self,
        config: RunConfig,
        engine: Engine,
        optimizer: Updater,
        data: Samples,
        warn: Callable[[str], None],
        where: Whereabouts,
    ) -> None:
        self._config, self._engine, self._optimizer, self._data = config, engine, optimizer, data
        self._warn, self._where = warn, where
        self._warned: dict[str, float] = {}
        self._faults = Faults(config.train.faults, engine, Path(config.run.dir), warn)
        mesh = engine.mesh
        self._flops = cost(config.model, config.data.sequence_length).flops_per_token
        # Rank 0 alone reports, and others that measured beside it would slow it down.
        dtype = getattr(torch, config.train.dtype)
        self._peak = numbers_peak(mesh.device, dtype) * mesh.config.world_size if mesh.is_main else 1.0

    def take(self, state: RunState, asked: Callable[[], bool]) -> tuple[RunState, StepMetrics | None, bool]:
        """The state after one more step, what to report (None: the step was skipped), and whether any rank was `asked`
        to stop (a collective). Raises ValueError on all ranks where replicas are found to differ."""
        config, engine = self._config, self._engine
        mesh, size = engine.mesh, config.train.global_batch
        self._where.at(f"step {state.step + 1}, loading data")
        began = time.perf_counter()
        batch = self._data.batch(state.samples, size, mesh.data_rank, mesh.data_size, config.train.micro_batch)
        batch = on_device(batch, mesh.device)
        waited = time.perf_counter() - began
        self._where.at(f"step {state.step + 1}, gradients")
        lr = config.optim.lr * config.schedule.factor(state.step, config.span)
        self._optimizer.begin(lr)
        out = engine.step_gradients(batch, config.micro_batches, asked)
        loss, norm = float(out.loss), float(total := engine.grad_norm())
        self._where.at(f"step {state.step + 1}, update")
        good = self._faults.passed(state.step + 1, loss, norm, batch, state.samples, config.micro_batches)
        if good:
            if config.optim.clip is not None:
                engine.clip(config.optim.clip, total)
            self._optimizer.step(lr)
            engine.after_step(out.stats)
        state = state.after(size, out.tokens)
        if config.train.check_replicas and state.step % config.train.check_replicas == 0:
            refuse_differences(engine, state.step)
        memory = config.memory.report(out.stats)
        if sentence := config.memory.warning(memory, self._warned, config.model.residual.exact):
            self._warn(sentence)
            self._warned = memory
        if not good:
            return state, None, out.votes > 0
        seconds = time.perf_counter() - began
        speed = out.tokens / seconds
        report = StepMetrics(
            step=state.step,
            loss=loss,
            grad_norm=norm,
            lr=lr,
            tokens=state.tokens,
            padding=1 - out.tokens / (size * config.data.sequence_length),
            tokens_per_second=speed,
            mfu=speed * self._flops / self._peak,
            memory_gib=peak_memory(mesh.device) / 2**30,
            data_wait=waited / seconds,
            losses={name: float(value) for name, value in out.losses.items()},
            experts=expert_loads(out.stats),
            dropped=dropped_picks(out.stats),
            depth=depth_used(out.stats),
            memory=memory,
            update=self._optimizer.report(),
        )
        return state, report, out.votes > 0


def refuse_differences(engine: Engine, step: int) -> None:
    """Raise ValueError for the first parameter that ranks hold unequally and should not (a collective)."""
    found = differences(engine)
    if found:
        more = f", and {len(found) - 1} others do" if len(found) > 1 else ""
        raise ValueError(
            f"after step {step} {found[0]}{more}, which should be equal bit for bit: a machine or a mesh computes "
            "wrongly; resume from a checkpoint before it, and find the step with train.check_replicas=1"
        )
