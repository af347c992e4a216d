"""The training loop, from the config to the last checkpoint."""

import contextlib
import dataclasses
from pathlib import Path

import torch
from rich.console import Console

from models.lm import LM
from parallel.context import exchanging
from parallel.mesh import Mesh
from parallel.stages import plan, told
from trainer import kernels, metrics
from trainer.config import RunConfig
from trainer.data.samples import held_out_rows, samples
from trainer.data.vocabulary import refuse_vocabulary
from trainer.evaluate import evaluate
from trainer.initial import start
from trainer.profiling import profiled
from trainer.progress import say
from trainer.resume import everyone, on_main, resume
from trainer.runfolder import claimed, refuse_lost, retire, write_config
from trainer.saver import Saver
from trainer.signals import Stop
from trainer.state import RunState
from trainer.step import Stepper
from trainer.whereabouts import Whereabouts

# Said at once, because a step may take minutes.
ANSWER = b"asked to stop: the run saves and ends after the step that it is in\n"


@dataclasses.dataclass(frozen=True)
class Launch:
    """What one launch of a run is told, beside the run's config.

    stop_after: save and end after this step, to be resumed later. fresh: move what the run's folder holds aside, and
    start at step 0.
    """

    stop_after: int | None = None
    fresh: bool = False

    def __post_init__(self) -> None:
        if self.stop_after is not None and self.stop_after < 1:
            raise ValueError(f"stop_after is {self.stop_after}; it must be at least 1")


def train(
    config: RunConfig,
    mesh: Mesh,
    launch: Launch | None = None,
    console: Console | None = None,
    stop: Stop | None = None,
    where: Whereabouts | None = None,
) -> RunState:
    """Run, or resume, `config` on all ranks of `mesh`; returns where it ended.

    console: where rank 0 prints. stop: once any rank's is requested, all save and end, after the step that they are in.
    where: is kept up to date.
    Raises ValueError for what does not fit together and for a folder that another run uses, FloatingPointError, on all
    ranks and before the weights are changed, at a loss or gradient that is not finite, and OSError where the last step
    could not be saved.
    """
    with contextlib.ExitStack() as stack:
        on_main(mesh.is_main, lambda: stack.enter_context(claimed(Path(config.run.dir))))
        return run(config, mesh, launch or Launch(), console or Console(), stop or Stop(), where or Whereabouts())


def run(config: RunConfig, mesh: Mesh, launch: Launch, console: Console, stop: Stop, where: Whereabouts) -> RunState:
    """The run itself, in a folder that is its own."""
    folder, size = Path(config.run.dir), config.train.global_batch
    where.at("start-up, opening the data")
    data, held_out = samples(config), held_out_rows(config)
    refuse_vocabulary(config)

    where.at("start-up, building the model")
    engine, optimizer = config.engine.build(config, mesh)
    chosen = kernels.choose(config, engine)
    if launch.fresh:
        on_main(mesh.is_main, lambda: retire(folder))

    def warn(sentence: str) -> None:
        say(console, f"warning: {sentence}")

    where.at("start-up, looking for a checkpoint")
    origin = None
    resumed = resume(config, engine, optimizer, warn)
    if resumed is None:
        on_main(mesh.is_main, lambda: refuse_lost(folder))
        origin = start(config, engine, warn)
    else:
        where.saved(resumed.step)
    state = resumed or RunState()
    last = min(config.train.steps, launch.stop_after or config.train.steps)
    if state.step < last:
        on_main(mesh.is_main, lambda: write_config(folder, config))

    with (
        metrics.opened(folder, state.step, last, console if mesh.is_main else None) as log,
        Saver(config, engine, optimizer, state.step if resumed else None, log.say, where) as saver,
        profiled(config.train.profile, folder, mesh) as profile_step,
    ):
        log.say(opening(config, mesh, state, last, origin) if state.step < last else nothing_to_do(config, state, last))
        placement = (kernels.line(chosen), exchanging(config.model, mesh.config), pipeline(config))
        notes = (*placement, *data.plan(config.train.steps * size))
        for line in filter(None, notes if state.step < last else ()):
            log.say(line)
        if mesh.is_main:
            # A terminal's progress line stands where it would begin.
            stop.answer = b"\n" * console.is_terminal + ANSWER
        stepper = Stepper(config, engine, optimizer, data, log.say, where)
        stopping = any(everyone(lambda: stop.requested))
        while state.step < last and not stopping:
            state, report, stopping = stepper.take(state, lambda: stop.requested)
            if report is None:
                log.record(state.step, {"train/skipped": 1})
            else:
                log.step(report, write=due(state.step, config.train.log_every) or state.step == last)
            if held_out is not None and due(state.step, config.train.eval_every):
                where.at(f"step {state.step}, validation")
                rows = config.train.eval_batches * size
                result = evaluate(engine, held_out, config.train.micro_batch, rows)
                log.record(state.step, {"valid/loss": result.loss, "valid/perplexity": result.perplexity})
                log.say(f"step {state.step}, held-out loss {result.loss:.4f}, perplexity {result.perplexity:.2f}")
            where.at(f"step {state.step}, saving")
            saver.poll()
            if due(state.step, config.train.save_every):
                saver.save(state)
            profile_step()
        stop.answer = b""
        where.at(f"step {state.step}, saving at the end")
        saver.finish(state)
        if stopping:
            log.say(f"asked to stop: ended after step {state.step}; the same command again resumes")
    return state


def due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def opening(config: RunConfig, mesh: Mesh, state: RunState, last: int, origin: Path | None) -> str:
    """One line on what is about to run. origin: where its first weights come from, if not from the seed."""
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in LM(config.model).parameters())
    fresh = "starting" if origin is None else f"starting from the weights of {origin}"
    begin = f"resuming after step {state.step}" if state.step else fresh
    return f"{begin}: {parameters:,} parameters, {mesh.config}, to step {last}, in {config.run.dir}"


def pipeline(config: RunConfig) -> str | None:
    """One line on where the layers are and what crosses their boundaries, with pipeline ranks."""
    if config.mesh.pp == 1:
        return None
    with torch.device("meta"):
        plans = plan(LM(config.model), config.mesh, config.data.sequence_length)
    tokens = config.train.micro_batch * config.data.sequence_length
    return told(plans, tokens, getattr(torch, config.train.dtype))


def nothing_to_do(config: RunConfig, state: RunState, last: int) -> str:
    """One line on a run that was resumed at its end, or past it."""
    steps = config.train.steps
    end, value = ("train.steps", steps) if state.step >= steps else ("stop_after", last)
    return f"already at step {state.step}, {end} is {value}: nothing to do; raise {end}"
