"""The training loop of a distillation: a student learns a lesson of its teacher on a run's training data."""

import math
from collections.abc import Callable

from parallel.distillation import Student
from trainer.config import RunConfig
from trainer.data.rows import on_device
from trainer.data.samples import Samples
from trainer.schedule.base import Span
from trainer.schedule.decay import Cosine

# The share of the steps in which the learning rate rises.
WARMUP = 0.05


def distill(
    student: Student,
    config: RunConfig,
    data: Samples,
    first_sample: int,
    steps: int,
    advance: Callable[[int], object] = lambda _: None,
) -> list[float]:
    """Take `steps` steps of the config's optimiser and batch; returns each one's loss, a mean over tokens: the
    divergence in nats, unless the student takes another lesson (a collective). The learning rate rises to optim.lr and
    falls along a cosine to a tenth.

    first_sample: of the run's order. advance: called after each step. Raises FloatingPointError, on all ranks and
    before the weights are changed, at a loss or gradient that is not finite.
    """
    mesh, size = student.mesh, config.train.global_batch
    optimizer, schedule = config.optim.build(student), Cosine(warmup=math.ceil(WARMUP * steps))
    span = Span(steps, size * config.data.sequence_length)
    losses = []
    for step in range(steps):
        batch = data.batch(first_sample + step * size, size, mesh.data_rank, mesh.data_size, config.train.micro_batch)
        optimizer.begin(lr := config.optim.lr * schedule.factor(step, span))
        out = student.step_gradients(on_device(batch, mesh.device), config.micro_batches)
        loss, norm = float(out.loss), float(total := student.grad_norm())
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise FloatingPointError(
                f"step {step + 1} of {steps} has loss {loss} and gradient norm {norm}, and nothing was "
                "written; use a smaller optim.lr"
            )
        if config.optim.clip is not None:
            student.clip(config.optim.clip, total)
        optimizer.step(lr)
        student.after_step(out.stats)
        losses.append(loss)
        advance(1)
    return losses
