"""The work of `weft convert`, on all ranks of a mesh: convert, distil, measure, and write at the very end."""

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console

from configs.structure import to_plain
from configs.text import dump_yaml
from parallel.distillation import Student, Teacher
from parallel.engine import Engine
from parallel.following import LayerByLayer
from parallel.mesh import Mesh
from trainer import checkpoint, kernels
from trainer.checkpoint import FOLDER, Checkpoint
from trainer.config import RunConfig
from trainer.conversion import Plan, Request
from trainer.data.fitting import fitting_stream
from trainer.data.rows import Rows
from trainer.data.samples import held_out_rows, samples
from trainer.data.sequences import Sequences
from trainer.distill import distill
from trainer.durable import sync_file
from trainer.evaluate import evaluate
from trainer.newfolder import staged
from trainer.progress import counting
from trainer.resume import load, on_main, saved
from trainer.runfolder import CONFIG
from trainer.state import RunState

HEAD = """\
# Train on from the converted weights; all settings are the source's, and those that the conversion was given:
#   weft train {out}/config.yaml train.steps=1000 optim.lr=1e-4
"""


@dataclasses.dataclass(frozen=True)
class Report:
    """Held-out losses in nats per token: of the source, as converted, after the fit layer by layer and after
    distillation (None without a step)."""

    source: float
    converted: float
    fitted: float | None
    distilled: float | None


def convert(
    plan: Plan,
    mesh: Mesh,
    request: Request,
    console: Console,
    say: Callable[[str], object],
    warn: Callable[[str], object],
) -> Report:
    """Write the request's folder (a collective). say: is told each loss as it is known. warn: of what does not go as
    was asked, or did harm.

    Raises FloatingPointError where learning breaks down, and OSError where the folder cannot be written; it does not
    exist then.
    """
    config, limit, steps = plan.work, request.limit, request.steps
    data, held_out = samples(config), evaluated_rows(config)
    settings = {"seed": config.run.seed, "dtype": getattr(torch, config.train.dtype)}
    teacher = Teacher(plan.source.model, mesh, **settings)
    kernels.choose_again(config, teacher, warn)
    load(plan.path, teacher)
    source = loss(teacher, held_out, config, limit, console)
    say(f"{plan.path}: held-out loss {source:.4f} nats per token")

    student = Student(
        config.model,
        mesh,
        teacher=teacher,
        memory=config.memory,
        compile=config.train.compile and steps + plan.fit > 0,
        **settings,
    )
    kernels.choose_again(config, student, warn)
    load(plan.path, student)
    converted = loss(student, held_out, config, limit, console)
    say(f"converted to {config.model.residual.kind}: held-out loss {converted:.4f}")

    fitted = distilled = None
    if plan.fit:
        with student.taking(LayerByLayer(request.estimate)):
            with counting(console, "fitting steps", plan.fit) as advance:
                errors = distill(student, config, data, plan.first_sample, plan.fit, advance)
        fitted = loss(student, held_out, config, limit, console)
        say(
            f"after {plan.fit} steps of fitting each layer: held-out loss {fitted:.4f}; a layer's error is "
            f"{errors[0]:.4f} of its step in the first, {errors[-1]:.4f} in the last"
        )
    if steps:
        first = plan.first_sample + plan.fit * config.train.global_batch
        with counting(console, "distilling steps", steps) as advance:
            divergences = distill(student, config, data, first, steps, advance)
        distilled = loss(student, held_out, config, limit, console)
        say(
            f"after {steps} steps of distillation: held-out loss {distilled:.4f}; divergence from the source "
            f"{divergences[0]:.4f} in the first step, {divergences[-1]:.4f} in the last"
        )
        if not distilled <= converted:
            warn(
                f"the distillation left the model worse ({distilled:.4f}) than as converted ({converted:.4f}): give "
                f"more --steps than {steps}, or lower optim.lr, which is {config.optim.lr:g}; --steps 0 converts alone"
            )
    write(student, plan.target, request.out)
    return Report(source, converted, fitted, distilled)


def evaluated_rows(config: RunConfig) -> Rows:
    """What `weft eval` goes through, so that its figures are these; a task's own held-out examples."""
    if config.data.task is not None:
        rows = held_out_rows(config)
    else:
        assert config.data.valid is not None
        stream, _ = fitting_stream(config.data.valid, "", config.model.vocab_size, config.data.tokenizer)
        rows = Sequences(stream, config.data.sequence_length, config.data.sequence_length)
    assert rows is not None
    return rows


def loss(engine: Engine, rows: Rows, config: RunConfig, limit: int | None, console: Console) -> float:
    with counting(console, "evaluating sequences", min(len(rows), limit or len(rows))) as advance:
        return evaluate(engine, rows, config.train.micro_batch, limit, advance).loss


def write(engine: Engine, config: RunConfig, out: Path) -> None:
    """A folder with a checkpoint of step 0 and the config (a collective)."""
    mesh, about = engine.mesh, Checkpoint(RunState(), to_plain(config), {}, {}, str(engine.mesh.config))
    group = dist.new_group(backend="gloo", timeout=mesh.timeout) if dist.is_initialized() else None
    with contextlib.ExitStack() as stack:
        folder = on_main(mesh.is_main, lambda: stack.enter_context(staged(out)))
        pieces = {name: piece.on_host() for name, piece, owner in saved(engine, None) if owner}
        checkpoint.save(folder / FOLDER, about, pieces, group if isinstance(group, dist.ProcessGroup) else None)

        def finish() -> None:
            (folder / CONFIG).write_text(HEAD.format(out=out) + dump_yaml(to_plain(config)), encoding="utf-8")
            sync_file(folder / CONFIG)
            stack.close()

        on_main(mesh.is_main, finish)
